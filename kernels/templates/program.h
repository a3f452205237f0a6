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

// `count` (or, where WHOLE, 64) values of one input pixel from channel c on, before the pool if there is one.
// c: a multiple of 64 where an operand is made of bits.
template <bool WHOLE>
INLINE void before_pool(const Operands& o, i64 pixel, i64 channels, i64 c, i64 count, float* __restrict out) {
{% for operand in operands %}
{% if operand.kind == "bits" %}
  alignas(64) u32 p{{ loop.index0 }}[WORD];
  expand64(o.p{{ loop.index0 }}[pixel * ceil_div(channels, WORD) + c / WORD], p{{ loop.index0 }});
{% else %}
  const {{ operand.type }}* __restrict p{{ loop.index0 }} = o.p{{ loop.index0 }} + {{ "pixel * channels + c" if operand.kind == "full" else "c" }};
{% endif %}
{% endfor %}
  auto one = [&](i64 i) {
{% for operand in operands %}
    const {{ "bool" if operand.kind == "bits" else "float" }} x{{ loop.index0 }} = {{ "p%d[i] != 0" % loop.index0 if operand.kind == "bits" else "load(p%d[i])" % loop.index0 }};
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
