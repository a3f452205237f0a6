// The statements of a pointwise program (program.py): text, operands, before, before_result.
INLINE float to_bfloat16(float x) {
  const u32 bits = float_bits(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  return x != x ? bits_float(0x7fc00000u) : bits_float(rounded);
}

struct Operands {
{% for operand in operands %}
  const {{ operand.type }}* p{{ loop.index0 }};
{% endfor %}
};

// Where a value is: all pixels are numbered by index, those of one row by position.
struct Pixel {
  i64 index, row, position;
};

// `count` (or, where WHOLE, 64) values of one input pixel from channel c on, before the pool if there is one.
// c: a multiple of 64 where an operand is made of bits.
template <bool WHOLE>
INLINE void before_pool(const Operands& o, const Pixel& at, i64 channels, i64 c, i64 count, float* __restrict out) {
  (void)at;
{% set starts = {"full": "at.index * channels + c", "map": "at.position * channels + c", "channel": "c"} %}
{% for operand in operands %}
{% if operand.kind == "bits" %}
  alignas(64) u32 p{{ loop.index0 }}[WORD];
  expand64(o.p{{ loop.index0 }}[at.index * ceil_div(channels, WORD) + c / WORD], p{{ loop.index0 }});
{% elif operand.kind == "row" %}
  const float x{{ loop.index0 }} = o.p{{ loop.index0 }}[at.row];
{% else %}
  const {{ operand.type }}* __restrict p{{ loop.index0 }} = o.p{{ loop.index0 }} + {{ starts[operand.kind] }};
{% endif %}
{% endfor %}
  auto one = [&](i64 i) {
{% for operand in operands if operand.kind != "row" %}
    const {{ "bool" if operand.kind == "bits" else "float" }} x{{ operand.index }} = {{ "p%d[i] != 0" % operand.index if operand.kind == "bits" else "load(p%d[i])" % operand.index }};
{% endfor %}
{% for line in before %}
    {{ line }}
{% endfor %}
    out[i] = {{ before_result }};
  };
  if (WHOLE)
    for (int i = 0; i < WORD; ++i) one(i);
  else
    for (i64 i = 0; i < count; ++i) one(i);
}
