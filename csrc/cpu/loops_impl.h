// The loops of the measurements. Included by one file per instruction set, inside its namespace, after its vectors
// (vectors_*.h) and kUnroll, the number of steps of the inner loop to unroll.

// Bytes ahead. Three streams of bfloat16 on one core of a Zen 5 EPYC: 26 GB/s at 1 KB, 36 from 3 KB on; float32: 32
// and 36.
constexpr int64_t kPrefetch = 3072;

template <class V, class F>
FASTFS_HD V load_at(const char* p, int64_t left) {
  if (left >= V::kLanes) return V::template load<F>(p);
  alignas(64) char padded[V::kLanes * kItemSize<F>] = {};
  __builtin_memcpy(padded, p, static_cast<size_t>(left * kItemSize<F>));
  return V::template load<F>(padded);
}

// Adds up the lanes of every sum, in a fixed tree, into lane 0.
inline void add_lanes(double (*total)[kLanes], int sums) {
  for (int k = 0; k < sums; ++k) {
    for (int width = kLanes / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) total[k][i] += total[k][i + width];
    }
  }
}

// Adds the terms of F of step `step` of a run, from elements stored as S, of the last input as B. With Tail the
// elements end at `left`.
template <class Sums, class F, class S, class B, class V, bool Tail>
FASTFS_HD void add_step(const char* const* inputs, int64_t start, int64_t left, int step, int half,
                        const Coefficients<V, Sums::kCoefficients>& coefficients, V (&acc)[Sums::kSums]) {
  constexpr int kIn = Sums::kInputs;
  const int64_t at = step * kLanes + half * V::kLanes;
  V x[kIn];
#pragma GCC unroll 4
  for (int i = 0; i < kIn; ++i) {
    const int64_t size = i + 1 < kIn ? kItemSize<S> : kItemSize<B>;
    const char* p = inputs[i] + (start + at) * size;
    if (!Tail && half == 0 && (step * kLanes * size) % 64 == 0) {
#pragma GCC unroll 2
      for (int64_t line = 0; line < kLanes * size; line += 64) __builtin_prefetch(p + kPrefetch + line);
    }
    if constexpr (Tail) {
      x[i] = i + 1 < kIn ? load_at<V, S>(p, left - at) : load_at<V, B>(p, left - at);
    } else {
      x[i] = i + 1 < kIn ? V::template load<S>(p) : V::template load<B>(p);
    }
  }
  Sums::template add_terms<F>(acc, x, coefficients);
}

// One run of kChain * kLanes elements, fewer with Tail: lanes [half * V::kLanes, (half + 1) * V::kLanes).
template <class Sums, class F, class S, class B, class V, bool Tail>
FASTFS_HD void run(const char* const* inputs, int64_t start, int64_t left, int half,
                   const Coefficients<V, Sums::kCoefficients>& coefficients, double (*total)[kLanes]) {
  V acc[Sums::kSums];
#pragma GCC unroll 16
  for (int k = 0; k < Sums::kSums; ++k) acc[k] = V::zero();
  if constexpr (Tail) {
#pragma GCC unroll 1
    for (int step = 0; step * kLanes + half * V::kLanes < left; ++step) {
      add_step<Sums, F, S, B, V, true>(inputs, start, left, step, half, coefficients, acc);
    }
  } else {
#pragma GCC unroll kUnroll
    for (int step = 0; step < kChain; ++step) {
      add_step<Sums, F, S, B, V, false>(inputs, start, left, step, half, coefficients, acc);
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < Sums::kSums; ++k) acc[k].add_to(total[k] + half * V::kLanes);
}

// The end of a chunk. Not inlined: the loop over whole runs has all registers.
template <class Sums, class F, class S, class B, class V>
__attribute__((noinline)) void run_tail(const char* const* inputs, int64_t start, int64_t left, int half,
                                        const Coefficients<V, Sums::kCoefficients>& coefficients,
                                        double (*total)[kLanes]) {
  run<Sums, F, S, B, V, true>(inputs, start, left, half, coefficients, total);
}

template <class Sums, class F, class S, class B, class V>
void chunk(const char* const* inputs, int64_t n, const double* coefficients, double* sums) {
  constexpr int64_t kRun = kChain * kLanes;
  constexpr int kHalves = kLanes / V::kLanes;
  const auto c = coefficients_at<V, Sums::kCoefficients>(coefficients);
  alignas(64) double total[Sums::kSums][kLanes] = {};
  int64_t start = 0;
  for (; start + kRun <= n; start += kRun) {
#pragma GCC unroll 4
    for (int half = 0; half < kHalves; ++half) run<Sums, F, S, B, V, false>(inputs, start, kRun, half, c, total);
  }
#pragma GCC unroll 1
  for (int half = 0; start < n && half < kHalves; ++half) {
    run_tail<Sums, F, S, B, V>(inputs, start, n - start, half, c, total);
  }
  add_lanes(total, Sums::kSums);
  for (int k = 0; k < Sums::kSums; ++k) sums[k] = total[k][0] * Sums::template factor<F, V>(k);
}

// `n` elements of dtype F as those of V.
template <class V, class F>
void widen(const char* from, char* to, int64_t n) {
#pragma GCC unroll 1
  for (int64_t i = 0; i < n; i += V::kLanes) {
    __builtin_prefetch(from + i * kItemSize<F> + kPrefetch);
    const V x = load_at<V, F>(from + i * kItemSize<F>, n - i);
    __builtin_memcpy(to + i * static_cast<int64_t>(sizeof x / V::kLanes), &x, sizeof x);
  }
}
constexpr Widening kWidening{{&widen<Single, F16>, &widen<Single, BF16>},
                             {&widen<Double, F16>, &widen<Double, BF16>, &widen<Double, F32>}};

template <class Sums>
constexpr ChunkTable<Sums> make_table() {
  ChunkTable<Sums> t{};  // in the order of DType: f16, bf16, f32, f64
  if constexpr (Sums::kSixteenBit) {
    t.single[0][0] = &chunk<Sums, F16, F16, F16, Single>;
    t.single[1][1] = &chunk<Sums, BF16, BF16, BF16, Single>;
  }
  t.single[2][2] = &chunk<Sums, F32, F32, F32, Single>;
  if constexpr (!Sums::kOneDtype) {
    t.single[0][2] = &chunk<Sums, F16, F16, F32, Single>;
    t.single[1][2] = &chunk<Sums, BF16, BF16, F32, Single>;
    t.single[2][0] = &chunk<Sums, F32, F32, F16, Single>;
    t.single[2][1] = &chunk<Sums, F32, F32, BF16, Single>;
  }
  t.dbl[3] = &chunk<Sums, F64, F64, F64, Double>;
  if constexpr (Sums::kOfFormat) {
    t.dbl[0] = &chunk<Sums, F16, F64, F64, Double>;
    t.dbl[1] = &chunk<Sums, BF16, F64, F64, Double>;
    t.dbl[2] = &chunk<Sums, F32, F64, F64, Double>;
  } else {
    t.dbl[0] = t.dbl[1] = t.dbl[2] = t.dbl[3];
  }
  return t;
}
#define FASTFS_TABLE(name, Sums) , make_table<Sums>()
constexpr SumLoops kSumLoops{{} FASTFS_MEASUREMENTS(FASTFS_TABLE)};
#undef FASTFS_TABLE
