// Sums over the depth for a tile of patches and prototypes, in registers. Included as vector.h is.
//
// Patches are packed by rows, prototypes by panels of WIDE vectors, and a tile of ROWS patches by one panel stays in
// registers over the whole depth.

template <class Real>
constexpr int LANES = VECTOR_BYTES / sizeof(Real);

#if VECTOR_BYTES == 64
constexpr int ROWS = 12;  // 12 × 2 sums, 2 vectors of prototypes and a patch: 27 of 32 registers
#else
constexpr int ROWS = 6;  // 15 of 16
#endif
constexpr int WIDE = 2;

// Lanes of a and b for one step of a transposition: blocks of `step` lanes off the diagonal change places.
template <int step, bool upper, class V, size_t... I>
INLINE V exchange(V a, V b, std::index_sequence<I...>) {
  constexpr size_t L = sizeof...(I), S = step;
  const auto from = [](size_t i) constexpr { return upper ? ((i & S) ? L + i : i + S) : ((i & S) ? L + i - S : i); };
#ifdef __clang__
  return __builtin_shufflevector(a, b, from(I)...);
#else
  using Lane = std::conditional_t<sizeof(V) / L == 8, int64_t, int32_t>;
  return __builtin_shuffle(a, b, typename VectorOf<Lane, sizeof(V)>::type{static_cast<Lane>(from(I))...});
#endif
}

template <int step, class V, int L>
INLINE void transpose_from(V (&a)[L]) {
  if constexpr (step < L) {
    constexpr auto lanes = std::make_index_sequence<L>();
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      if (i & step) continue;
      const V upper = a[i], lower = a[i + step];
      a[i] = exchange<step, false>(upper, lower, lanes), a[i + step] = exchange<step, true>(upper, lower, lanes);
    }
    transpose_from<2 * step>(a);
  }
}

template <class V, int L>
INLINE void transpose(V (&a)[L]) {
  transpose_from<1>(a);
}

// The sum of the lanes, by halves.
template <class T, int lanes>
INLINE T sum(typename VectorOf<T, lanes * sizeof(T)>::type value) {
  if constexpr (lanes == 2) {
    return value[0] + value[1];
  } else {
    typename VectorOf<T, lanes * sizeof(T) / 2>::type half[2];
    std::memcpy(half, &value, sizeof(value));
    return sum<T, lanes / 2>(half[0] + half[1]);
  }
}

// The largest lane.
template <class T, int lanes>
INLINE T largest(typename VectorOf<T, lanes * sizeof(T)>::type value) {
  if constexpr (lanes == 2) {
    return value[0] > value[1] ? value[0] : value[1];
  } else {
    typename VectorOf<T, lanes * sizeof(T) / 2>::type half[2];
    std::memcpy(half, &value, sizeof(value));
    return largest<T, lanes / 2>(half[0] > half[1] ? half[0] : half[1]);
  }
}

// How tiles are summed: from a number for each patch, or (bytes) one for each prototype.
template <class Real>
struct Start {
  using Sum = Real;
  static INLINE Vector<Real> begin(const Real* start, int i, int) { return broadcast<Vector<Real>>(start[i]); }
};

template <class Real>
struct Products : Start<Real> {
  template <class V>
  static INLINE V add(V total, V x, V p) {
    return fma(x, p, total);
  }
};

template <class Real>
struct Gaps : Start<Real> {
  template <class V>
  static INLINE V add(V total, V x, V p) {
    const V difference = x - p;
    return total + (difference < 0 ? -difference : difference);
  }
};

template <class Real>
struct Squares : Start<Real> {
  template <class V>
  static INLINE V add(V total, V x, V p) {
    const V difference = x - p;
    return fma(difference, difference, total);
  }
};

#if VECTOR_BYTES == 64
// By the names of their instructions, since the instruction set of these loops lacks them.
struct PairProducts : Start<float> {  // of pairs of bfloat16, added in float32
  static INLINE Vector<float> add(Vector<float> total, Vector<uint32_t> x, Vector<uint32_t> p) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(total) : "v"(x), "v"(p));
    return total;
  }
};

struct ByteProducts {  // of four unsigned bytes with four signed ones
  using Sum = int32_t;
  static INLINE Vector<int32_t> begin(const int32_t* start, int, int j) {
    return load_bits<Vector<int32_t>>(start + j * LANES<int32_t>);
  }
  static INLINE Vector<int32_t> add(Vector<int32_t> total, Vector<uint32_t> x, Vector<uint32_t> p) {
    asm("vpdpbusd %2, %1, %0" : "+v"(total) : "v"(x), "v"(p));
    return total;
  }
};
#endif

// out[i][·] = start + Σ over the depth, for H patches and WIDTH vectors of prototypes. Patches lie in chunks of LANES
// cells, (chunks, ROWS, LANES), or `by_cell`, (cells, ROWS).
template <class Step, class Cell, bool by_cell, int H, int WIDTH>
void tile(const Cell* rows, const Cell* panel, int64_t chunks, const typename Step::Sum* start,
          typename Step::Sum* out) {
  using V = Vector<typename Step::Sum>;
  constexpr int L = LANES<Cell>, CELLS = by_cell ? 1 : L;
  V total[H][WIDTH];
#pragma GCC unroll 16
  for (int i = 0; i < H; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < WIDTH; ++j) total[i][j] = Step::begin(start, i, j);
  for (; chunks > 0; --chunks, rows += ROWS * CELLS)
    for (int d = 0; d < CELLS; ++d, panel += WIDTH * L) {
      Vector<Cell> p[WIDTH];
#pragma GCC unroll 2
      for (int j = 0; j < WIDTH; ++j) p[j] = load_bits<Vector<Cell>>(panel + j * L);
#pragma GCC unroll 16
      for (int i = 0; i < H; ++i) {
        const Vector<Cell> x = broadcast<Vector<Cell>>(rows[i * CELLS + d]);
#pragma GCC unroll 2
        for (int j = 0; j < WIDTH; ++j) total[i][j] = Step::add(total[i][j], x, p[j]);
      }
    }
#pragma GCC unroll 16
  for (int i = 0; i < H; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < WIDTH; ++j) store_bits(out + (i * WIDTH + j) * L, total[i][j], false);
}

template <class Step, class Cell, bool by_cell, int WIDTH, size_t... H>
INLINE void tile_of(int height, std::index_sequence<H...>, const Cell* rows, const Cell* panel, int64_t chunks,
                    const typename Step::Sum* start, typename Step::Sum* out) {
  using Sum = typename Step::Sum;
  using Run = void (*)(const Cell*, const Cell*, int64_t, const Sum*, Sum*);
  static constexpr Run RUNS[] = {&tile<Step, Cell, by_cell, int(H) + 1, WIDTH>...};
  RUNS[height - 1](rows, panel, chunks, start, out);
}

template <class Step, class Cell, bool by_cell = false>
void tile_of(int height, int width, const Cell* rows, const Cell* panel, int64_t chunks,
             const typename Step::Sum* start, typename Step::Sum* out) {
  constexpr auto heights = std::make_index_sequence<ROWS>();
  if (width == 1)
    tile_of<Step, Cell, by_cell, 1>(height, heights, rows, panel, chunks, start, out);
  else
    tile_of<Step, Cell, by_cell, WIDE>(height, heights, rows, panel, chunks, start, out);
}

// Vectors of `count` numbers of type T as Real, the last one filled up with zeros.
template <class T, class Use>
INLINE void each_vector(const T* from, int64_t count, const Use& use) {
  constexpr int L = Memory<T>::WIDTH;
  int64_t i = 0;
  for (; i + L <= count; i += L) use(i, Memory<T>::load(from + i));
  if (i < count) {
    T rest[L] = {};
    std::copy(from + i, from + count, rest);
    use(i, Memory<T>::load(rest));
  }
}
