{% include "common.h" %}
// selection.py in C++: float64, one row after the other, in the same order.

constexpr double NON_FINITE_IMPORTANCE = {{ non_finite_importance }};

enum Prune { NONE, TOPK, BERNOULLI, SYSTEMATIC };

static std::vector<i64> largest_first(const std::vector<double>& importance) {
  std::vector<i64> order(importance.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i64(i);
  std::stable_sort(order.begin(), order.end(), [&](i64 a, i64 b) { return importance[a] > importance[b]; });
  return order;
}

static std::vector<double> inclusion_probabilities(const std::vector<double>& importance, i64 count) {
  const i64 size = i64(importance.size());
  std::vector<double> p(size, 1.0), suffix(size + 1, 0.0);
  if (count >= size) return p;
  const std::vector<i64> order = largest_first(importance);
  for (i64 j = size - 1; j >= 0; --j) suffix[j] = suffix[j + 1] + importance[order[j]];
  i64 certain = 0;
  while (certain < count && double(count - certain) * importance[order[certain]] > suffix[certain]) ++certain;
  const double left = double(count - certain), total = suffix[certain];
  for (i64 j = certain; j < size; ++j)
    p[order[j]] = total > 0 ? left * importance[order[j]] / total : left / double(size - certain);
  return p;
}

static std::vector<i64> systematic(const std::vector<double>& p, i64 count, Keys keys) {
  const i64 size = i64(p.size());
  std::vector<i64> order(size), picked;
  for (i64 i = 0; i < size; ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(),
                   [&](i64 a, i64 b) { return hash32(u32(a), keys) < hash32(u32(b), keys); });
  const double start = uniform(u32(size), keys);
  double cumulative = 0;
  for (i64 position = 0; position < size; ++position) {
    cumulative += p[order[position]];
    const i64 needed = count - i64(picked.size());
    // The second condition only repairs rounding: as many rows are left as are still needed.
    if (needed && (cumulative > start + double(picked.size()) || size - position <= needed))
      picked.push_back(order[position]);
  }
  std::sort(picked.begin(), picked.end());
  return picked;
}

// rows int32 and scale float32 have `entries` elements; unused ones become -1 and 0.
EXPORT i64 select_rows(const float* importance, i64 size, i64 prune, i64 count, i64 k0, i64 k1, i32* rows,
                       float* scale, i64 entries, i64) {
  const Keys keys{u32(k0), u32(k1)};
  std::vector<double> values(size), p(size, 1.0);
  for (i64 i = 0; i < size; ++i)
    values[i] = std::isfinite(importance[i]) ? double(importance[i]) : NON_FINITE_IMPORTANCE;
  std::vector<i64> picked;
  if (prune == BERNOULLI || prune == SYSTEMATIC) p = inclusion_probabilities(values, count);
  if (prune == SYSTEMATIC) picked = systematic(p, std::min(count, size), keys);
  else if (prune == TOPK) {
    picked = largest_first(values);
    picked.resize(std::min(count, size));
    std::sort(picked.begin(), picked.end());
  } else
    for (i64 i = 0; i < size; ++i)
      if (prune == NONE || double(uniform(u32(i), keys)) < p[i]) picked.push_back(i);
  std::fill(rows, rows + entries, -1);
  std::fill(scale, scale + entries, 0.0f);
  for (size_t k = 0; k < picked.size(); ++k) {
    rows[k] = i32(picked[k]);
    scale[k] = p[picked[k]] > 0 ? float(1.0 / p[picked[k]]) : 0.0f;
  }
  return OK;
}
