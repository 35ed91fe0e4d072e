// The loops of the row ops: cast, copy and squares. Included by one file per instruction set, inside its namespace,
// after its vectors (vectors_*.h), loops_impl.h and kRowUnroll, the number of steps of the inner loop to unroll.
//
// A cast rounds to nearest even. Casts between float64 and a 16-bit format go through float, as in torch.

// kLanes elements, in kLanes / V::kLanes registers. All loads come before the stores, which the compiler takes for
// stores to the same memory.
template <class V, class F>
FASTFS_HD void load_step(const char* from, V (&x)[kLanes / V::kLanes]) {
#pragma GCC unroll 4
  for (int i = 0; i < kLanes / V::kLanes; ++i) x[i] = V::template load<F>(from + i * V::kLanes * kItemSize<F>);
}
template <class To>
FASTFS_HD void store_step(char* to, const Single (&x)[kLanes / Single::kLanes]) {
#pragma GCC unroll 2
  for (int i = 0; i < kLanes / Single::kLanes; ++i) x[i].template store<To>(to + i * Single::kLanes * kItemSize<To>);
}

// One step. To is `void` if nothing is copied.
template <class V, class F, class To>
FASTFS_HD void row_step(const char* from, char* to, V (&sum)[kLanes / V::kLanes]) {
  V x[kLanes / V::kLanes];
  load_step<V, F>(from, x);
#pragma GCC unroll 4
  for (int i = 0; i < kLanes / V::kLanes; ++i) sum[i] = add(sum[i], mul(x[i], x[i]));
  if constexpr (std::is_same_v<F, To>) {
    __builtin_memcpy(to, from, kLanes * kItemSize<F>);
  } else if constexpr (std::is_same_v<V, Single> && !std::is_void_v<To>) {
    store_step<To>(to, x);
  } else if constexpr (!std::is_void_v<To>) {
    Single rounded[kLanes / Single::kLanes];
    load_step<Single, F>(from, rounded);
    store_step<To>(to, rounded);
  }
}

template <class To>
constexpr int64_t kStepBytes = kLanes * kItemSize<To>;
template <>
constexpr int64_t kStepBytes<void> = 0;

// The sum of the squares of n elements: in accumulators of V, which take kChain elements per lane and are added to
// accumulators in double.
template <class V, class F, class To>
FASTFS_HD double row_pass(const char* from, char* to, int64_t n) {
  constexpr int kParts = kLanes / V::kLanes, kDoubles = kLanes / Double::kLanes;
  Double total[kDoubles];
#pragma GCC unroll 4
  for (int i = 0; i < kDoubles; ++i) total[i] = Double::zero();
  const auto add_chain = [&total](const V(&sum)[kParts]) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) {
      if constexpr (is_single<V>::value) {
        add_to(total + i * (V::kLanes / Double::kLanes), sum[i]);
      } else {
        total[i] = add(total[i], sum[i]);
      }
    }
  };
  while (n >= kChain * kLanes) {
    V sum[kParts];
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) sum[i] = V::zero();
#pragma GCC unroll kRowUnroll
    for (int i = 0; i < kChain; ++i) {
      row_step<V, F, To>(from, to, sum);
      from += kStepBytes<F>;
      to += kStepBytes<To>;
    }
    add_chain(sum);
    n -= kChain * kLanes;
  }
  if (n > 0) {
    V sum[kParts];
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) sum[i] = V::zero();
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
    }
    add_chain(sum);
  }
#pragma GCC unroll 4
  for (int half = kDoubles / 2; half > 0; half /= 2) {
#pragma GCC unroll 4
    for (int i = 0; i < half; ++i) total[i] = add(total[i], total[i + half]);
  }
  return sum_of_lanes(total[0]);
}

// The squares in double, when those in float left its range.
template <class F>
__attribute__((noinline)) double repeat_row(const char* from, int64_t n) {
  return one_nan(row_pass<Double, F, void>(from, nullptr, n));
}

template <class F, class To>
double take_row(const char* from, char* to, int64_t n) {
  if constexpr (std::is_same_v<F, F64>) {
    return one_nan(row_pass<Double, F, To>(from, to, n));
  } else {
    const double sum = row_pass<Single, F, To>(from, to, n);
    return squares_need_double(sum) ? repeat_row<F>(from, n) : sum;
  }
}

#define FASTFS_ROW(F) {&take_row<F, F16>, &take_row<F, BF16>, &take_row<F, F32>, &take_row<F, F64>}
constexpr RowLoops kRowLoops{{FASTFS_ROW(F16), FASTFS_ROW(BF16), FASTFS_ROW(F32), FASTFS_ROW(F64)},
                             {&take_row<F16, void>, &take_row<BF16, void>, &take_row<F32, void>, &take_row<F64, void>}};
#undef FASTFS_ROW
