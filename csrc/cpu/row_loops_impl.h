// The loops of the row ops: cast, copy and squares. Included by one file per instruction set, inside its namespace,
// after its vectors (vectors_*.h), loops_impl.h and kRowUnroll, the number of steps of the inner loop to unroll.
//
// A cast rounds to nearest even. Casts between float64 and a 16-bit format go through float, as in torch.

// One step: kLanes elements, in kLanes / V::kLanes registers. To is `void` if nothing is copied.
template <class V, class F, class To>
FASTFS_HD void row_step(const char* from, char* to, V (&sum)[kLanes / V::kLanes]) {
#pragma GCC unroll 4
  for (int i = 0; i < kLanes / V::kLanes; ++i) {
    const V x = V::template load<F>(from + i * V::kLanes * kItemSize<F>);
    sum[i] = add(sum[i], mul(x, x));
  }
  if constexpr (std::is_same_v<F, To>) {
    __builtin_memcpy(to, from, kLanes * kItemSize<F>);
  } else if constexpr (!std::is_void_v<To>) {
    constexpr int kStep = Single::kLanes;
#pragma GCC unroll 2
    for (int i = 0; i < kLanes / kStep; ++i) {
      Single::template load<F>(from + i * kStep * kItemSize<F>).template store<To>(to + i * kStep * kItemSize<To>);
    }
  }
}

template <class To>
constexpr int64_t kStepBytes = kLanes * kItemSize<To>;
template <>
constexpr int64_t kStepBytes<void> = 0;

// The squares of n elements, in float accumulators of kChain elements (V = Single) or in double.
template <class V, class F, class To>
FASTFS_HD double row_pass(const char* from, char* to, int64_t n) {
  constexpr int kParts = kLanes / V::kLanes;
  alignas(64) double total[kLanes] = {};
  while (n > 0) {
    V sum[kParts];
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) sum[i] = V::zero();
    if (n >= kChain * kLanes) {
#pragma GCC unroll kRowUnroll
      for (int i = 0; i < kChain; ++i) {
        row_step<V, F, To>(from, to, sum);
        from += kStepBytes<F>;
        to += kStepBytes<To>;
      }
      n -= kChain * kLanes;
    } else {
      for (; n >= kLanes; n -= kLanes) {
        row_step<V, F, To>(from, to, sum);
        from += kStepBytes<F>;
        to += kStepBytes<To>;
      }
      if (n > 0) {  // zeros after the end add nothing
        alignas(64) char in[kStepBytes<F>] = {};
        alignas(64) char out[kStepBytes<To> + 1];
        __builtin_memcpy(in, from, static_cast<size_t>(n * kItemSize<F>));
        row_step<V, F, To>(in, out, sum);
        if constexpr (!std::is_void_v<To>) __builtin_memcpy(to, out, static_cast<size_t>(n * kItemSize<To>));
        n = 0;
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) sum[i].add_to(total + i * V::kLanes);
  }
  return lanes_sum(total);
}

template <class F, class To>
double take_row(const char* from, char* to, int64_t n) {
  if constexpr (std::is_same_v<F, F64>) {
    return one_nan(row_pass<Double, F, To>(from, to, n));
  } else {
    const double sum = row_pass<Single, F, To>(from, to, n);
    return squares_need_double(sum) ? one_nan(row_pass<Double, F, void>(from, nullptr, n)) : sum;
  }
}

#define FASTFS_ROW(F) {&take_row<F, F16>, &take_row<F, BF16>, &take_row<F, F32>, &take_row<F, F64>}
constexpr RowLoops kRowLoops{{FASTFS_ROW(F16), FASTFS_ROW(BF16), FASTFS_ROW(F32), FASTFS_ROW(F64)},
                             {&take_row<F16, void>, &take_row<BF16, void>, &take_row<F32, void>, &take_row<F64, void>}};
#undef FASTFS_ROW
