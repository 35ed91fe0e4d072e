// Body of the row loops; included by one file per instruction set, inside that file's namespace, after its types of 16
// lanes
//   Floats   with static zero(), static load<F>(const char*), store<To>(char*), add_square(Floats)
//   Doubles  with static zero(), static load<F>(const char*), add_square(Doubles), add(Floats), add(Doubles),
//            sum(), a fixed tree
// Casts round to nearest even. Those between float64 and a 16-bit format go through float, as torch's do. A NaN that
// is cast to bfloat16 becomes 0x7fc0; to float16 it keeps its sign and upper digits, as in the processor's instruction.

template <class F>
constexpr int64_t kItemSize = same_dtype<F, F64>::value   ? 8
                              : same_dtype<F, F32>::value ? 4
                                                          : 2;

// One step: kLanes elements. To is `void` for squares alone.
template <class V, class F, class To>
FASTFS_HD void step(const char* from, char* to, V& sum) {
  sum.add_square(V::template load<F>(from));
  if constexpr (same_dtype<F, To>::value) {
    __builtin_memcpy(to, from, kLanes * kItemSize<F>);
  } else if constexpr (!same_dtype<To, void>::value) {
    Floats::template load<F>(from).template store<To>(to);
  }
}

template <class To>
constexpr int64_t kStepBytes = kLanes * kItemSize<To>;
template <>
constexpr int64_t kStepBytes<void> = 0;

template <class V, class F, class To>
FASTFS_HD double pass(const char* from, char* to, int64_t n) {
  Doubles total = Doubles::zero();
  while (n >= kChain * kLanes) {
    V sum = V::zero();
#pragma GCC unroll kRowUnroll
    for (int i = 0; i < kChain; ++i) {
      step<V, F, To>(from, to, sum);
      from += kStepBytes<F>;
      to += kStepBytes<To>;
    }
    total.add(sum);
    n -= kChain * kLanes;
  }
  if (n > 0) {
    V sum = V::zero();
    for (; n >= kLanes; n -= kLanes) {
      step<V, F, To>(from, to, sum);
      from += kStepBytes<F>;
      to += kStepBytes<To>;
    }
    if (n > 0) {  // zeros behind the end add nothing
      alignas(64) char in[kStepBytes<F>] = {};
      alignas(64) char out[kStepBytes<To> + 1];
      __builtin_memcpy(in, from, static_cast<size_t>(n * kItemSize<F>));
      step<V, F, To>(in, out, sum);
      if constexpr (!same_dtype<To, void>::value) {
        __builtin_memcpy(to, out, static_cast<size_t>(n * kItemSize<To>));
      }
    }
    total.add(sum);
  }
  return total.sum();
}

template <class F, class To>
double take(const char* from, char* to, int64_t n) {
  if constexpr (same_dtype<F, F64>::value) {
    return one_nan(pass<Doubles, F, To>(from, to, n));
  } else {
    const double sum = pass<Floats, F, To>(from, to, n);
    return squares_need_double(sum) ? one_nan(pass<Doubles, F, void>(from, nullptr, n)) : sum;
  }
}

#define FASTFS_ROW(F) {&take<F, F16>, &take<F, BF16>, &take<F, F32>, &take<F, F64>}
constexpr RowLoops kRowTable{{FASTFS_ROW(F16), FASTFS_ROW(BF16), FASTFS_ROW(F32), FASTFS_ROW(F64)},
                             {&take<F16, void>, &take<BF16, void>, &take<F32, void>, &take<F64, void>}};
#undef FASTFS_ROW
