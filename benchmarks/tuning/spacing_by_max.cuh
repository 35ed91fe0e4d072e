// Another way to the spacing of float16 below its normal numbers: a maximum in place of a comparison and a selection.
// Replaces fastfs::spacing of feature_sums.h for float16, with the same values.
#pragma once

namespace fastfs {

template <class V>
FASTFS_HD V f16_spacing_exponent(V x) {
  const V e = fmax(exponent_part(x), static_cast<V>(F16::kMinNormal));
  return where_at_least(x, 0x1p-24, e, 0.0);
}
template <>
FASTFS_HD float spacing<F16, float>(float x) {
  return f16_spacing_exponent(x);
}
template <>
FASTFS_HD double spacing<F16, double>(double x) {
  return add(scaled(f16_spacing_exponent(x), F16::kEpsilon), sub(x, x));
}

}  // namespace fastfs
