// The search for the nearest patches, and their map, by one thread. Included as vector.h is.
//
// Patches are packed by rows, prototypes by panels of WIDE vectors, and a tile of ROWS patches by one panel stays in
// registers over the whole depth. The tile gives the screen, x·p − |x|²/2, whose largest value is the nearest patch;
// that patch is then measured in the direct form.

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

// out[i][·] = start + Σ over the depth, for H patches and WIDTH vectors of prototypes.
template <class Step, class Cell, int H, int WIDTH>
void tile(const Cell* rows, const Cell* panel, int64_t chunks, const typename Step::Sum* start,
          typename Step::Sum* out) {
  using V = Vector<typename Step::Sum>;
  constexpr int L = LANES<Cell>;
  V total[H][WIDTH];
#pragma GCC unroll 16
  for (int i = 0; i < H; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < WIDTH; ++j) total[i][j] = Step::begin(start, i, j);
  for (; chunks > 0; --chunks, rows += ROWS * L)
    for (int d = 0; d < L; ++d, panel += WIDTH * L) {
      Vector<Cell> p[WIDTH];
#pragma GCC unroll 2
      for (int j = 0; j < WIDTH; ++j) p[j] = load_bits<Vector<Cell>>(panel + j * L);
#pragma GCC unroll 16
      for (int i = 0; i < H; ++i) {
        const Vector<Cell> x = broadcast<Vector<Cell>>(rows[i * L + d]);
#pragma GCC unroll 2
        for (int j = 0; j < WIDTH; ++j) total[i][j] = Step::add(total[i][j], x, p[j]);
      }
    }
#pragma GCC unroll 16
  for (int i = 0; i < H; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < WIDTH; ++j) store_bits(out + (i * WIDTH + j) * L, total[i][j], false);
}

template <class Step, class Cell, int WIDTH, size_t... H>
INLINE void tile_of(int height, std::index_sequence<H...>, const Cell* rows, const Cell* panel, int64_t chunks,
                    const typename Step::Sum* start, typename Step::Sum* out) {
  using Sum = typename Step::Sum;
  using Run = void (*)(const Cell*, const Cell*, int64_t, const Sum*, Sum*);
  static constexpr Run RUNS[] = {&tile<Step, Cell, int(H) + 1, WIDTH>...};
  RUNS[height - 1](rows, panel, chunks, start, out);
}

template <class Step, class Cell>
void tile_of(int height, int width, const Cell* rows, const Cell* panel, int64_t chunks,
             const typename Step::Sum* start, typename Step::Sum* out) {
  constexpr auto heights = std::make_index_sequence<ROWS>();
  if (width == 1)
    tile_of<Step, Cell, 1>(height, heights, rows, panel, chunks, start, out);
  else
    tile_of<Step, Cell, WIDE>(height, heights, rows, panel, chunks, start, out);
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

// Patches of one sample that lie together in the packed rows: tiles of nearly one height.
struct Segment {
  int64_t sample, tile, tiles, count;
  int low, taller;  // patches of a tile, and how many tiles have one more
  int64_t odd,
      first_odd;   // patches that the fast forms cannot rank, by a NaN or squares out of range; and where listed
  double longest;  // square of the others' longest
  bool by_bytes;   // whether bytes will do

  int height(int64_t i) const { return low + (i < taller); }
};

template <class T>
class PatchRows {
 public:
  using Real = typename Memory<T>::Compute;
  using V = Vector<Real>;
  static constexpr int L = LANES<Real>;

  // With `unit`, rows are divided by their lengths; with `once`, the first of equal patches is enough. Bytes are of
  // what is left without the centre.
  PatchRows(const PrototypeShape& shape, const FeatureMap& x, Metric metric, Screen kind, bool unit, bool once)
      : shape_(shape), x_(x), metric_(metric), kind_(kind), unit_(unit), once_(once), offset_(patch_offsets(shape, x)) {
    depth = static_cast<int64_t>(offset_.size());
    chunks = (depth + L - 1) / L;
    cell_chunks = kind == Screen::bytes ? (chunks + 3) / 4 : (chunks + 1) / 2;
    for (int axis = 0; axis < AXES; ++axis) grid_[axis] = shape.grid(axis);
    at_once = rows_at_once(shape, sizeof(Real)), capacity = (at_once + ROWS - 1) / ROWS;
    const int64_t slots = capacity * ROWS;
    rows_ = row_buffer_.get(slots * chunks * L);
    odd = odd_buffer_.get(slots), is_run_ = run_buffer_.get(slots);
    Real** const numbers[] = {&start, &scale, &far, &inverse, &reach, &square_of};
    for (size_t i = 0; i < std::size(numbers); ++i) *numbers[i] = number_buffers_[i].get(slots);
    float** const of_bytes[] = {&byte_start, &byte_scale, &byte_reach, &byte_square, &missed};
    for (size_t i = 0; i < std::size(of_bytes); ++i) *of_bytes[i] = byte_number_buffers_[i].get(slots);
    if (kind != Screen::real) cell_rows_ = cell_buffer_.get(slots * cell_chunks * L);
    centre = centre_buffer_.get(chunks * L);
    std::fill_n(centre, chunks * L, Real{0});
    id = id_buffer_.get(slots), slot_ = slot_buffer_.get(slots), place_ = place_buffer_.get(slots);
    square_ = square_buffer_.get(slots + L), out_ = out_buffer_.get(slots);
    window_ = shape.window();
  }

  // Packs the patches [at, end) of `sample` as one segment, for which there is room, and moves `at`.
  void add(int64_t sample, int64_t& at, int64_t end, const bool* mask) {
    int64_t count = 0;
    int64_t* const list = id + used * ROWS;
    for (; at < end; ++at)
      if (!mask || mask[sample * shape_.patches() + at]) list[count++] = at;
    if (count == 0) return;
    const int64_t tiles = (count + ROWS - 1) / ROWS;
    const int low = static_cast<int>(count / tiles), taller = static_cast<int>(count % tiles);
    const Segment segment{sample, used, tiles, count, low, taller, 0, static_cast<int64_t>(odd_slots.size()), 0, true};
    segments.push_back(segment);
    // From dense to one place a row: the last first, since they only move up.
    int64_t from = count;
    for (int64_t t = segment.tiles - 1; t >= 0; --t)
      for (int i = segment.height(t) - 1; i >= 0; --i) list[t * ROWS + i] = list[--from];
    used += segment.tiles;
    int64_t n = 0;
    for (int64_t t = 0; t < segment.tiles; ++t)
      for (int i = 0; i < segment.height(t); ++i) {
        slot_[n] = (segment.tile + t) * ROWS + i;
        place_[n] = place(grid_, x_, id[slot_[n]]);
        out_[n] = const_cast<Real*>(row(slot_[n]));
        square_[n++] = 0;
      }
    const T* const base = static_cast<const T*>(x_.data) + sample * x_.sample;
    if (x_.channel == 1 && window_ == 1)
      copy(base, count);
    else
      transposed(base, count);
    measure(count, segments.back());
  }

  bool full(int64_t more) const { return capacity - used < (more + ROWS - 1) / ROWS; }
  void clear() { used = 0, segments.clear(), odd_slots.clear(); }

  const Real* row(int64_t slot) const { return rows_ + slot / ROWS * (chunks * ROWS * L) + slot % ROWS * L; }
  const Real* rows(int64_t tile) const { return rows_ + tile * (chunks * ROWS * L); }
  const uint32_t* cell_rows(int64_t tile) const { return cell_rows_ + tile * (cell_chunks * ROWS * L); }

  int64_t depth, chunks, cell_chunks, at_once, capacity, used = 0;
  std::vector<Segment> segments;
  std::vector<int64_t> odd_slots;
  // By slot (tile · ROWS + row): the patch; where its screen starts and what that is multiplied by; where its direct
  // form starts; 1 / its length; and what a bound is made of: the length (cosine: 1) and its square (where it enters).
  int64_t* id;
  Real *start, *scale, *far, *inverse, *reach, *square_of;
  // The same of bytes, and the length of what they miss.
  float *byte_start, *byte_scale, *byte_reach, *byte_square, *missed;
  bool* odd;
  Real* centre;

 private:
  // Patches whose channels lie side by side.
  void copy(const T* x, int64_t count) {
    for (int64_t n = 0; n < count; ++n) {
      V total{};
      each_vector(x + place_[n], depth, [&](int64_t d, V value) {
        store_bits(out_[n] + d * ROWS, value, false);
        total = fma(value, value, total);
      });
      square_[n] = sum<Real, L>(total);
    }
  }

  // L channels of all patches, then the next: so that memory is read in few streams.
  void transposed(const T* x, int64_t count) {
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t left = std::min<int64_t>(L, depth - c * L), *const offset = offset_.data() + c * L;
      // What comes next lies in too many short runs for the processor to foresee.
      const bool last = c + 1 == chunks;
      const T* const next = last ? x + x_.sample : x;
      const int64_t* const next_offset = offset_.data() + (last ? 0 : (c + 1) * L);
      const int64_t next_left = last ? std::min<int64_t>(L, depth) : std::min<int64_t>(L, depth - (c + 1) * L);
      for (int64_t n = 0; n < count; n += L) {
        const int64_t* const to = place_ + n;
        const int some = static_cast<int>(std::min<int64_t>(L, count - n));
        if (c == 0) {
          bool run = some == L && x_.stride[AXES - 1] == 1;
          for (int i = 1; run && i < L; ++i) run = to[i] == to[0] + i;
          is_run_[n / L] = run;
        }
        const bool run = is_run_[n / L] && left == L;
        V a[L], total = load_bits<V>(square_ + n);
        if (run) {
          if (next_left == L) {
#pragma GCC unroll 16
            for (int d = 0; d < L; ++d) __builtin_prefetch(next + (to[0] + next_offset[d]), 0, 2);
          }
#pragma GCC unroll 16
          for (int d = 0; d < L; ++d) a[d] = Memory<T>::load(x + (to[0] + offset[d]));
        } else {
          for (int d = 0; d < L; ++d) {
            T values[L] = {};
            for (int i = 0; i < (d < left ? some : 0); ++i) values[i] = x[offset[d] + to[i]];
            a[d] = Memory<T>::load(values);
          }
        }
#pragma GCC unroll 16
        for (int d = 0; d < L; ++d) total = fma(a[d], a[d], total);
        store_bits(square_ + n, total, false);
        transpose(a);
        Real* const* const out = out_ + n;
        if (some == L) {
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) store_bits(out[i] + c * ROWS * L, a[i], false);
        } else {
          for (int i = 0; i < some; ++i) store_bits(out[i] + c * ROWS * L, a[i], false);
        }
      }
    }
  }

  // From the tiles' choice: whatever is added to an infinity leaves it, or is NaN.
  void exclude(int64_t slot) {
    constexpr Real INF = std::numeric_limits<Real>::infinity();
    start[slot] = -INF, byte_start[slot] = -std::numeric_limits<float>::infinity(), far[slot] = INF;
    scale[slot] = 1, reach[slot] = square_of[slot] = 0;
    byte_scale[slot] = byte_reach[slot] = byte_square[slot] = missed[slot] = 0;
  }

  // Is the patch, such as one of a background, equal to an earlier one of the segment, which therefore goes before it?
  bool repeated(int64_t slot, Real square) {
    uint64_t key = 0;
    std::memcpy(&key, &square, sizeof(square));
    int64_t& seen = seen_[key * 0x9e3779b97f4a7c15 >> 58];
    if (seen < 0) {
      seen = slot;
      return false;
    }
    const Real *const x = row(slot), *const y = row(seen);
    for (int64_t c = 0; c < chunks * ROWS * L; c += ROWS * L)
      if (std::memcmp(x + c, y + c, L * sizeof(Real)) != 0) {
        seen = slot;
        return false;
      }
    return true;
  }

  void measure(int64_t count, Segment& segment) {
    std::fill_n(seen_, 64, -1);
    const bool squared = metric_ == SQEUCLIDEAN || metric_ == EUCLIDEAN;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t s = slot_[i];
      const Real* const x = row(s);
      const Real square = square_[i];
      odd[s] = !in_range(square) && !(square == 0 && zero(x));
      inverse[s] = metric_ == COSINE && square > 0 ? 1 / std::sqrt(square) : 0;
      if (odd[s]) {
        odd_slots.push_back(s), ++segment.odd;
        exclude(s);
        continue;
      }
      if (once_ && repeated(s, square)) {
        exclude(s);
        continue;
      }
      Real ranked = square;
      if constexpr (sizeof(Real) == 4 && VECTOR_BYTES == 64) {
        if (kind_ == Screen::pairs) ranked = round_pairs(x, s);
        if (kind_ == Screen::bytes) round_bytes(x, s, segment);
      }
      segment.longest = std::max<double>(segment.longest, square);
      start[s] = squared ? -ranked / 2 : 0, far[s] = 0;
      scale[s] = metric_ == COSINE && ranked > 0 ? 1 / std::sqrt(ranked) : 0;
      reach[s] = metric_ == COSINE ? 1 : std::sqrt(square), square_of[s] = squared ? square : 0;
      if (unit_)
        for (int64_t c = 0; c < chunks; ++c) {
          Real* const at = const_cast<Real*>(x) + c * ROWS * L;
          store_bits(at, load_bits<V>(at) * broadcast<V>(inverse[s]), false);
        }
    }
  }

  // The row in bfloat16, and the square of its length then.
  float round_pairs(const Real* x, int64_t slot) {
    BFloat16* const to = reinterpret_cast<BFloat16*>(cell_row(slot));
    V total{};
    for (int64_t c = 0; c < 2 * cell_chunks; ++c) {
      BFloat16* const half = to + (c / 2 * ROWS * 2 + c % 2) * L;
      Memory<BFloat16>::store(half, c < chunks ? bits<Vector<float>>(load_bits<V>(x + c * ROWS * L)) : Vector<float>{},
                              false);
      const Vector<float> value = Memory<BFloat16>::load(half);
      total = fma(bits<V>(value), bits<V>(value), total);
    }
    return sum<Real, L>(total);
  }

#if VECTOR_BYTES == 64
  // The row without the centre in whole multiples of `byte_scale`, as bytes around 128.
  void round_bytes(const Real* x, int64_t slot, Segment& segment) {
    using F = Vector<float>;
    const auto value = [&](int64_t c) INLINE_LAMBDA {
      return bits<F>(load_bits<V>(x + c * ROWS * L)) - bits<F>(load_bits<V>(centre + c * L));
    };
    F peak{}, square{}, lost{};
    for (int64_t c = 0; c < chunks; ++c) {
      const F v = value(c), size = v < 0 ? -v : v;
      peak = size > peak ? size : peak;
      square = fma(v, v, square);
    }
    const float most = largest<float, LANES<float>>(peak), step = most / 127;
    const F per = broadcast<F>(most > 0 ? 127 / most : 0), by = broadcast<F>(-step);
    uint8_t* const to = reinterpret_cast<uint8_t*>(cell_row(slot));
    for (int64_t c = 0; c < chunks; ++c) {
      const F v = value(c);
      const __m512i whole = _mm512_cvtps_epi32(bits<__m512>(v * per));
      const F rest = fma(bits<F>(_mm512_cvtepi32_ps(whole)), by, v);
      lost = fma(rest, rest, lost);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + (c / 4 * ROWS * 4 + c % 4) * L),
                       _mm512_cvtepi32_epi8(_mm512_add_epi32(whole, _mm512_set1_epi32(128))));
    }
    const float total = sum<float, LANES<float>>(square);
    const float square_missed = sum<float, LANES<float>>(lost);
    const bool squared = metric_ == SQEUCLIDEAN || metric_ == EUCLIDEAN;
    byte_scale[slot] = metric_ == COSINE ? step * inverse[slot] : step;
    missed[slot] = std::sqrt(metric_ == COSINE ? (total > 0 ? square_missed / total : 0) : square_missed);
    byte_start[slot] = squared ? -total / 2 : 0;
    byte_reach[slot] = metric_ == COSINE ? 1 : std::sqrt(total), byte_square[slot] = squared ? total : 0;
    segment.by_bytes &= fit_for_bytes(total, most);
  }
#endif

  uint32_t* cell_row(int64_t slot) const {
    return cell_rows_ + slot / ROWS * (cell_chunks * ROWS * L) + slot % ROWS * L;
  }

  bool zero(const Real* x) const {
    for (int64_t c = 0; c < chunks; ++c)
      for (int i = 0; i < L; ++i)
        if (x[c * ROWS * L + i] != 0) return false;
    return true;
  }

 public:
  // Squares of lengths whose screens do not overflow, and which do not lose their digits below the smallest number.
  static bool in_range(Real square) {
    return square >= std::numeric_limits<Real>::min() * (sizeof(Real) == 4 ? 1e8 : 1e16) &&
           square <= std::numeric_limits<Real>::max() / 64;
  }
  // Neither do the squares of what bytes miss.
  static bool fit_for_bytes(float square, float most) {
    return (square == 0 && most == 0) || (square >= 1e-24f && square <= std::numeric_limits<float>::max() / 64);
  }

 private:
  const PrototypeShape& shape_;
  const FeatureMap& x_;
  const Metric metric_;
  const Screen kind_;
  const bool unit_, once_;
  int64_t seen_[64];  // patches of the segment, by the squares of their lengths
  const std::vector<int64_t> offset_;
  int64_t grid_[AXES], window_;
  Buffer<Real> row_buffer_, centre_buffer_, square_buffer_, number_buffers_[6];
  Buffer<float> byte_number_buffers_[5];
  Buffer<uint32_t> cell_buffer_;
  Buffer<int64_t> id_buffer_, slot_buffer_, place_buffer_;
  Buffer<Real*> out_buffer_;
  Buffer<bool> odd_buffer_, run_buffer_;
  bool* is_run_;
  // Of the segment that is packed.
  int64_t *slot_, *place_;
  Real *square_, **out_;
  Real* rows_;
  uint32_t* cell_rows_ = nullptr;
};

// Packs the patches of a task and calls flush() whenever no more fit, and at the end. Segments begin at multiples of a
// number that the shape alone gives, so that no result depends on how the work is divided.
template <class T, class Flush>
INLINE void each_segment(const SearchTask& task, PatchRows<T>& patches, const bool* mask, const Flush& flush) {
  for (int64_t b = task.samples.first; b < task.samples.last; ++b)
    for (int64_t at = task.patches.first; at < task.patches.last;) {
      const int64_t end = std::min(task.patches.last, at + patches.at_once);
      if (patches.full(end - at)) flush();
      patches.add(b, at, end, mask);
    }
  flush();
}

// Prototypes p[first], …: as rows, for the direct form, and transposed, for the tiles.
template <class T>
class Panel {
 public:
  using Real = typename Memory<T>::Compute;
  using V = Vector<Real>;
  static constexpr int L = LANES<Real>, COUNT = WIDE * L;

  Panel(const PatchRows<T>& patches, Screen kind, bool unit) : patches_(patches), kind_(kind), unit_(unit) {
    rows_ = row_buffer_.get(COUNT * patches.chunks * L);
    cells = cell_buffer_.get(COUNT * patches.chunks * L);
    if (kind != Screen::real) {
      small_rows_ = small_row_buffer_.get(COUNT * patches.cell_chunks * L);
      small_cells = small_cell_buffer_.get(COUNT * patches.cell_chunks * L);
    }
  }

  void pack(const T* p, int64_t first, int64_t number) {
    count = static_cast<int>(number), real_ = false;
    width = (count + L - 1) / L;
    const int64_t depth = patches_.depth, padded = patches_.chunks * L;
    for (int q = 0; q < width * L; ++q) {
      Real* const to = rows_ + q * padded;
      V total{};
      if (q < count)
        each_vector(p + (first + q) * depth, depth, [&](int64_t d, V value) {
          store_bits(to + d, value, false);
          total = fma(value, value, total);
        });
      else
        std::fill_n(to, padded, Real{0});
      square[q] = sum<Real, L>(total);
      odd[q] = !PatchRows<T>::in_range(square[q]) &&
               !(square[q] == 0 && std::all_of(to, to + padded, [](Real value) { return value == 0; }));
      length[q] = std::sqrt(square[q]);
      inverse[q] = square[q] > 0 ? 1 / length[q] : 0;
      if (unit_ && !odd[q])
        for (int64_t d = 0; d < padded; ++d) to[d] *= inverse[q];
    }
    if constexpr (sizeof(Real) == 4 && VECTOR_BYTES == 64) {
      if (kind_ == Screen::pairs) return pack_pairs();
      if (kind_ == Screen::bytes) return pack_bytes();
    }
    pack_real();
  }

  void pack_real() {
    if (!real_) transposed(rows_, patches_.chunks, cells);
    real_ = true;
  }

  const Real* row(int q) const { return rows_ + q * patches_.chunks * L; }

  int count, width;
  Real* cells;
  uint32_t* small_cells = nullptr;
  alignas(64) Real square[COUNT], length[COUNT], inverse[COUNT];
  // Of bytes: what a multiple stands for, where sums start, what is lost by length, and the length of what is kept.
  alignas(64) float step[COUNT];
  alignas(64) int32_t start[COUNT];
  double lost[COUNT], kept[COUNT];
  bool odd[COUNT], by_bytes;

 private:
  template <class Cell>
  void transposed(const Cell* from, int64_t chunks, Cell* to) const {
    for (int64_t c = 0; c < chunks; ++c)
      for (int j = 0; j < width; ++j) {
        Vector<Cell> a[L];
        for (int i = 0; i < L; ++i) a[i] = load_bits<Vector<Cell>>(from + ((j * L + i) * chunks + c) * L);
        transpose(a);
        for (int i = 0; i < L; ++i) store_bits(to + ((c * L + i) * width + j) * L, a[i], false);
      }
  }

  void pack_pairs() {
    const int64_t chunks = patches_.chunks, pair_chunks = patches_.cell_chunks;
    for (int q = 0; q < width * L; ++q)
      for (int64_t c = 0; c < 2 * pair_chunks; ++c)
        Memory<BFloat16>::store(
            reinterpret_cast<BFloat16*>(small_rows_ + q * pair_chunks * L) + c * L,
            c < chunks ? bits<Vector<float>>(load_bits<V>(rows_ + (q * chunks + c) * L)) : Vector<float>{}, false);
    transposed(small_rows_, pair_chunks, small_cells);
  }

  void pack_bytes() {
#if VECTOR_BYTES == 64
    using F = Vector<float>;
    by_bytes = true;
    const int64_t chunks = patches_.chunks, byte_chunks = patches_.cell_chunks;
    for (int q = 0; q < width * L; ++q) {
      const auto value = [&](int64_t c) INLINE_LAMBDA {
        if (q >= count) return F{};
        return bits<F>(load_bits<V>(rows_ + (q * chunks + c) * L)) - bits<F>(load_bits<V>(patches_.centre + c * L));
      };
      F peak{}, square{}, missing{};
      for (int64_t c = 0; c < chunks; ++c) {
        const F v = value(c), size = v < 0 ? -v : v;
        peak = size > peak ? size : peak;
        square = fma(v, v, square);
      }
      const float most = largest<float, LANES<float>>(peak);
      const bool fits = PatchRows<T>::fit_for_bytes(sum<float, LANES<float>>(square), most);
      step[q] = most / 127;
      const F per = broadcast<F>(most > 0 ? 127 / most : 0), by = broadcast<F>(-step[q]);
      int8_t* const to = reinterpret_cast<int8_t*>(small_rows_ + q * byte_chunks * L);
      Vector<int32_t> total{};
      F squares{};
      for (int64_t c = 0; c < 4 * byte_chunks; ++c) {
        const F v = c < chunks ? value(c) : F{};
        const __m512i whole = _mm512_cvtps_epi32(bits<__m512>(v * per));
        const F back = bits<F>(_mm512_cvtepi32_ps(whole)), rest = fma(back, by, v);
        missing = fma(rest, rest, missing), squares = fma(back, back, squares);
        total += bits<Vector<int32_t>>(whole);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + c * L), _mm512_cvtepi32_epi8(whole));
      }
      start[q] = -128 * sum<int32_t, LANES<int32_t>>(total);
      lost[q] = std::sqrt(double{sum<float, LANES<float>>(missing)});
      kept[q] = step[q] * std::sqrt(double{sum<float, LANES<float>>(squares)});
      by_bytes &= fits || odd[q];
    }
    transposed(small_rows_, byte_chunks, small_cells);
#endif
  }

  const PatchRows<T>& patches_;
  const Screen kind_;
  const bool unit_;
  bool real_;
  Buffer<Real> row_buffer_, cell_buffer_;
  Buffer<uint32_t> small_row_buffer_, small_cell_buffer_;
  Real* rows_;
  uint32_t* small_rows_ = nullptr;
};

// The direct form of a patch and a prototype, in W.
template <class W, class T>
double direct(Metric metric, const PatchRows<T>& patches, int64_t slot, const Panel<T>& panel, int q) {
  using Real = typename Memory<T>::Compute;
  using V = Vector<Real>;
  constexpr int L = LANES<Real>;
  using Wide = typename VectorOf<W, L * sizeof(W)>::type;
  const Real* const x = patches.row(slot);
  const Real* const p = panel.row(q);
  const int64_t chunks = patches.chunks;
  const auto get_x = [&](int64_t c)
                         INLINE_LAMBDA { return __builtin_convertvector(load_bits<V>(x + c * ROWS * L), Wide); };
  const auto get_p = [&](int64_t c) INLINE_LAMBDA { return __builtin_convertvector(load_bits<V>(p + c * L), Wide); };
  const auto fused = [](Wide a, Wide b, Wide to) INLINE_LAMBDA {
    if constexpr (sizeof(Wide) == VECTOR_BYTES)
      return fma(a, b, to);
    else
      return a * b + to;
  };
  Wide total{};
  if (metric == DOT) {
    for (int64_t c = 0; c < chunks; ++c) total = fused(get_x(c), get_p(c), total);
    return -sum<W, L>(total);
  }
  if (metric == COSINE) {
    W of_x = patches.inverse[slot], of_p = panel.inverse[q];
    if constexpr (sizeof(W) == 8) {
      Wide xx{}, pp{};
      for (int64_t c = 0; c < chunks; ++c) xx = fused(get_x(c), get_x(c), xx), pp = fused(get_p(c), get_p(c), pp);
      const W square_x = sum<W, L>(xx), square_p = sum<W, L>(pp);
      if (square_x == 0 || square_p == 0) return square_x * square_p == 0 ? 1 : NAN;  // 0·∞ and 0·NaN
      of_x = 1 / std::sqrt(square_x), of_p = 1 / std::sqrt(square_p);
    } else if (of_x == 0 || of_p == 0) {
      return 1;
    }
    for (int64_t c = 0; c < chunks; ++c) {
      const Wide difference = get_x(c) * of_x - get_p(c) * of_p;
      total = fused(difference, difference, total);
    }
    return sum<W, L>(total) / 2;
  }
  const auto add = [&](Wide& to, int64_t c) INLINE_LAMBDA {
    const Wide difference = get_x(c) - get_p(c);
    to = fused(difference, difference, to);
  };
  Wide other{};
  int64_t c = 0;
  for (; c + 1 < chunks; c += 2) add(total, c), add(other, c + 1);
  if (c < chunks) add(total, c);
  return sum<W, L>(total + other);
}

template <class T>
class PrototypeSearcher {
 public:
  using Real = typename Memory<T>::Compute;
  using V = Vector<Real>;
  using Slot = std::conditional_t<sizeof(Real) == 8, int64_t, int32_t>;
  static constexpr int L = LANES<Real>, COUNT = WIDE * L;
  static constexpr Real INF = std::numeric_limits<Real>::infinity();

  PrototypeSearcher(const PrototypeSearch& args, const Winners& winners, Screen kind)
      : args_(args),
        winners_(winners),
        kind_(kind),
        keeps_(args.verify || args.precision == AUTO),
        patches_(args.shape, args.x, args.metric, kind, false, args.shape.topk == 1),
        panel_(patches_, kind, false) {
    // Of a sum of depth + 1 products in any order, and of operands rounded to bfloat16.
    const double unit = std::numeric_limits<Real>::epsilon() / 2;
    error_ = 1.01 * (static_cast<double>(patches_.depth) + 8) * unit + (kind == Screen::pairs ? 1.01 / 128 : 0);
    if (kind == Screen::bytes && (args.metric == SQEUCLIDEAN || args.metric == EUCLIDEAN)) centre();
  }

  void run(const SearchTask& task) {
    for (int64_t b = task.samples.first; b < task.samples.last; ++b)
      for (int64_t p = task.prototypes.first; p < task.prototypes.last; ++p) winners_.clear(row(task.part, b, p));
    each_segment(task, patches_, args_.mask, [&] { flush(task); });
  }

 private:
  int64_t row(int64_t part, int64_t b, int64_t p) const {
    return (part * args_.shape.samples + b) * args_.shape.prototypes + p;
  }

  // Bytes hold more of what is small: so patches and prototypes are taken from about the middle of some prototypes,
  // which changes no distance.
  void centre() {
    const int64_t step = std::max<int64_t>(1, args_.shape.prototypes / 64);
    double count = 0;
    std::vector<double> total(patches_.chunks * L);
    for (int64_t p = 0; p < args_.shape.prototypes; p += step, ++count)
      each_vector(static_cast<const T*>(args_.p) + p * patches_.depth, patches_.depth, [&](int64_t d, V value) {
        for (int i = 0; i < L; ++i) total[d + i] += value[i];
      });
    for (int64_t d = 0; d < patches_.depth; ++d) {
      const Real middle = static_cast<Real>(total[d] / count);
      patches_.centre[d] = PatchRows<T>::in_range(middle * middle) ? middle : 0;
    }
  }

  void flush(const SearchTask& task) {
    if (!patches_.segments.empty())
      for (int64_t p = task.prototypes.first; p < task.prototypes.last; p += COUNT) {
        panel_.pack(static_cast<const T*>(args_.p), p, std::min<int64_t>(COUNT, task.prototypes.last - p));
        for (const Segment& segment : patches_.segments) search(segment, row(task.part, segment.sample, p));
      }
    patches_.clear();
  }

  void search(const Segment& segment, int64_t first) {
    if (segment.odd < segment.count) {
      if (args_.shape.topk == 1 && !keeps_)
        nearest(segment, first);
      else
        measured(segment, first);
    }
    for (int q = 0; q < panel_.count; ++q) {
      if (panel_.odd[q])
        for (int64_t t = 0; t < segment.tiles; ++t)
          for (int i = 0; i < segment.height(t); ++i) offer(first, (segment.tile + t) * ROWS + i, q);
      else
        for (int64_t i = 0; i < segment.odd; ++i) offer(first, patches_.odd_slots[segment.first_odd + i], q);
    }
  }

  void offer(int64_t first, int64_t slot, int q) { winners_.offer(first + q, distance(slot, q), patches_.id[slot]); }

  // The best by the screen alone.
  void nearest(const Segment& segment, int64_t first) {
    using Slots = Vector<Slot>;
    V best[WIDE];
    Slots at[WIDE] = {};
    for (int j = 0; j < WIDE; ++j) best[j] = broadcast<V>(-INF);
    alignas(64) Real out[ROWS * COUNT];
    for (int64_t t = segment.tile; t < segment.tile + segment.tiles; ++t) {
      const int height = segment.height(t - segment.tile);
      run_tile(height, t, out);
      for (int i = 0; i < height; ++i) {
        const Slots slot = broadcast<Slots>(static_cast<Slot>(t * ROWS + i));
        for (int j = 0; j < panel_.width; ++j) {
          const V score = load_bits<V>(out + (i * panel_.width + j) * L);
          const auto better = score > best[j];
          best[j] = better ? score : best[j], at[j] = better ? slot : at[j];
        }
      }
    }
    Slot slots[COUNT];
    std::memcpy(slots, at, sizeof(slots));
    for (int q = 0; q < panel_.count; ++q)
      if (!panel_.odd[q]) offer(first, slots[q], q);
  }

  // Screens, and measures all that may be among the nearest for what the screen is off by: so those are among them.
  // Where too many may be, the direct form at every patch tells them apart.
  void measured(const Segment& segment, int64_t first) {
    const bool squared = args_.metric == SQEUCLIDEAN || args_.metric == EUCLIDEAN;
    constexpr int64_t ALL = std::numeric_limits<int64_t>::max();
    // Beyond this many, the direct form costs less.
    const int64_t room =
        panel_.count * (4 * args_.shape.topk + segment.count * patches_.chunks / (3 * patches_.chunks + 24));
    bool done = false;
#if VECTOR_BYTES == 64
    if constexpr (sizeof(Real) == 4)
      if (kind_ == Screen::bytes && segment.by_bytes && panel_.by_bytes)
        done = likely(ByBytes(*this), segment, first, room);
#endif
    if (!done && !(kind_ == Screen::bytes && squared)) {
      if (kind_ == Screen::bytes) panel_.pack_real();
      done = likely(ByProducts(*this), segment, first, squared ? room : ALL);
    }
    if (!done) {
      panel_.pack_real();
      likely(BySquares(*this), segment, first, ALL);
    }
  }

  // A screen writes what the scores of a tile are at most, and keeps what the best is at least.
  struct ByProducts {
    explicit ByProducts(PrototypeSearcher& of) : of(of) {
      const Real by = static_cast<Real>(of.keeps_ ? (of.args_.metric == COSINE ? 2 : 1) * of.error_ : 0);
      for (int q = 0; q < COUNT; ++q) slope[q] = by * of.panel_.length[q];
      square = static_cast<Real>(of.keeps_ ? of.error_ : 0);
    }

    INLINE void tile(int64_t t, int height, Real* out, V (&best)[WIDE]) const {
      of.run_tile(height, t, out);
      const int width = of.panel_.width;
      for (int i = 0; i < height; ++i) {
        const int64_t slot = t * ROWS + i;
        const V reach = broadcast<V>(of.patches_.reach[slot]), own = broadcast<V>(square * of.patches_.square_of[slot]);
        for (int j = 0; j < width; ++j) {
          Real* const at = out + (i * width + j) * L;
          const V score = load_bits<V>(at), off = fma(reach, load_bits<V>(slope + j * L), own), least = score - off;
          store_bits(at, score + off, false);
          best[j] = least > best[j] ? least : best[j];
        }
      }
    }

    // At most `most` of a score is reached by one of at least what this returns.
    Real widened(const Segment& segment, Real most, int q) const {
      const Real reach = of.args_.metric == COSINE ? 1 : static_cast<Real>(std::sqrt(segment.longest));
      const bool squared = of.args_.metric == SQEUCLIDEAN || of.args_.metric == EUCLIDEAN;
      return most - 2 * (reach * slope[q] + (squared ? square * static_cast<Real>(segment.longest) : 0)) * Real{1.01};
    }

    PrototypeSearcher& of;
    alignas(64) Real slope[COUNT];
    Real square;
  };

  // The direct form is off by a share of itself, and by squares that are too small to be held.
  struct BySquares {
    explicit BySquares(PrototypeSearcher& of)
        : of(of),
          error(static_cast<Real>(of.keeps_ ? of.error_ : 0)),
          least(of.keeps_ ? (of.patches_.depth + 8) * std::numeric_limits<Real>::min() : 0) {}

    INLINE void tile(int64_t t, int height, Real* out, V (&best)[WIDE]) const {
      const int width = of.panel_.width;
      tile_of<Squares<Real>>(height, width, of.patches_.rows(t), of.panel_.cells, of.patches_.chunks,
                             of.patches_.far + t * ROWS, out);
      for (int i = 0; i < height; ++i)
        for (int j = 0; j < width; ++j) {
          Real* const at = out + (i * width + j) * L;
          const V score = -load_bits<V>(at), off = fma(score, broadcast<V>(-error), broadcast<V>(least)),
                  low = score - off;
          store_bits(at, score + off, false);
          best[j] = low > best[j] ? low : best[j];
        }
    }

    Real widened(const Segment&, Real most, int) const { return most * (1 + 3 * error) - 3 * least; }

    PrototypeSearcher& of;
    Real error, least;
  };

#if VECTOR_BYTES == 64
  // |x·p − x̃·p̃| ≤ |x||p − p̃| + |x − x̃||p̃|, and rounding.
  struct ByBytes {
    explicit ByBytes(PrototypeSearcher& of) : of(of), square(static_cast<float>(of.error_)) {
      for (int q = 0; q < COUNT; ++q) {
        const double lost = of.panel_.lost[q], kept = of.panel_.kept[q];
        slope[q] = static_cast<float>(1.001 * lost + (of.args_.metric == COSINE ? 2 : 1) * of.error_ * (kept + lost));
        by_missed[q] = static_cast<float>(1.001 * kept);
      }
    }

    INLINE void tile(int64_t t, int height, float* out, V (&best)[WIDE]) const {
      const auto& patches = of.patches_;
      const int width = of.panel_.width;
      alignas(64) int32_t sums[ROWS * COUNT];
      tile_of<ByteProducts>(height, width, patches.cell_rows(t), of.panel_.small_cells, patches.cell_chunks,
                            of.panel_.start, sums);
      for (int i = 0; i < height; ++i) {
        const int64_t slot = t * ROWS + i;
        const V scale = broadcast<V>(patches.byte_scale[slot]), start = broadcast<V>(patches.byte_start[slot]),
                reach = broadcast<V>(patches.byte_reach[slot]), missed = broadcast<V>(patches.missed[slot]),
                own = broadcast<V>(square * patches.byte_square[slot]);
        for (int j = 0; j < width; ++j) {
          const V whole = __builtin_convertvector(load_bits<Vector<int32_t>>(sums + (i * width + j) * L), V);
          const V score = fma(whole, scale * load_bits<V>(of.panel_.step + j * L), start);
          const V off = fma(reach, load_bits<V>(slope + j * L), fma(missed, load_bits<V>(by_missed + j * L), own));
          const V least = score - off;
          store_bits(out + (i * width + j) * L, score + off, false);
          best[j] = least > best[j] ? least : best[j];
        }
      }
    }

    Real widened(const Segment&, Real most, int) const { return most; }  // one winner only, so there is no need

    PrototypeSearcher& of;
    alignas(64) float slope[COUNT], by_missed[COUNT];
    float square;
  };
#endif

  template <class By>
  bool likely(const By& by, const Segment& segment, int64_t first, int64_t room) {
    const int width = panel_.width, stride = width * L;
    Real* const most = score_buffer_.get(segment.tiles * ROWS * COUNT);
    V best[WIDE];
    for (int j = 0; j < WIDE; ++j) best[j] = broadcast<V>(-INF);
    for (int64_t t = 0; t < segment.tiles; ++t)
      by.tile(segment.tile + t, segment.height(t), most + t * ROWS * stride, best);
    const int64_t topk = args_.shape.topk;
    if (topk > 1)
      for (int j = 0; j < width; ++j) best[j] = lower(segment, most + j * L);
    alignas(64) Real least[COUNT];
    for (int j = 0; j < WIDE; ++j) store_bits(least + j * L, best[j], false);
    for (int q = 0; q < COUNT; ++q)
      if (q >= panel_.count || panel_.odd[q])
        least[q] = NAN;  // which nothing reaches
      else if (topk > 1)
        least[q] = std::max(by.widened(segment, least[q], q), -std::numeric_limits<Real>::max());
    const V least_0 = load_bits<V>(least), least_1 = load_bits<V>(least + L);
    maybe_.clear();
    for (int64_t t = 0; t < segment.tiles; ++t) {
      const int height = segment.height(t);
      for (int i = 0; i < height; ++i) {
        const Real* const at = most + (t * ROWS + i) * stride;
        uint32_t hit = lanes(load_bits<V>(at) >= least_0);
        if (width > 1) hit |= lanes(load_bits<V>(at + L) >= least_1) << L;
        if (hit == 0) continue;
        for (; hit; hit &= hit - 1) maybe_.push_back({(segment.tile + t) * ROWS + i, __builtin_ctz(hit)});
        if (static_cast<int64_t>(maybe_.size()) > room) return false;
      }
    }
    Candidate nearest_yet[COUNT];
    for (const auto& [slot, q] : maybe_) {
      const double d = distance(slot, q);
      if (topk > 1)
        winners_.offer(first + q, d, patches_.id[slot]);
      else if (nearest_yet[q].slot < 0 || d < nearest_yet[q].distance)
        nearest_yet[q] = {d, slot};
    }
    for (int q = 0; q < panel_.count; ++q)
      if (nearest_yet[q].slot >= 0)
        winners_.offer(first + q, nearest_yet[q].distance, patches_.id[nearest_yet[q].slot]);
    return true;
  }

  // For each lane a number that at least topk of the scores reach, and few more: by halving.
  V lower(const Segment& segment, const Real* scores) const {
    const auto each = [&](const auto& use) INLINE_LAMBDA {
      for (int64_t t = 0; t < segment.tiles; ++t)
        for (int i = 0; i < segment.height(t); ++i) use(load_bits<V>(scores + (t * ROWS + i) * panel_.width * L));
    };
    // Odd patches have none.
    V low = broadcast<V>(INF), high = -low;
    each([&](V score) INLINE_LAMBDA {
      low = (score < low) & (score > -INF) ? score : low;
      high = score > high ? score : high;
    });
    const int64_t topk = args_.shape.topk;
    if (segment.count - segment.odd <= topk) return low;
    using Slots = Vector<Slot>;
    const Slots wanted = broadcast<Slots>(static_cast<Slot>(topk));
    const Slots enough = broadcast<Slots>(static_cast<Slot>(topk + topk / 8));
    for (int step = 0; step < 16; ++step) {
      const V middle = low * Real{0.5} + high * Real{0.5};
      Slots count{};
      each([&](V score) INLINE_LAMBDA { count -= score >= middle; });
      const auto reached = count >= wanted;
      low = reached ? middle : low, high = reached ? high : middle;
      if (lanes((reached & (count <= enough)) | (low >= high)) == lanes(low == low)) break;
    }
    return low;
  }

  // The screens of a tile.
  INLINE void run_tile(int height, int64_t t, Real* out) {
    const Real* const start = patches_.start + t * ROWS;
    const int width = panel_.width;
#if VECTOR_BYTES == 64
    if constexpr (sizeof(Real) == 4)
      if (kind_ == Screen::pairs)
        tile_of<PairProducts>(height, width, patches_.cell_rows(t), panel_.small_cells, patches_.cell_chunks, start,
                              out);
#endif
    if (kind_ != Screen::pairs)
      tile_of<Products<Real>>(height, width, patches_.rows(t), panel_.cells, patches_.chunks, start, out);
    if (args_.metric == COSINE)
      for (int i = 0; i < height; ++i)
        for (int j = 0; j < width; ++j) {
          Real* const at = out + (i * width + j) * L;
          store_bits(at, load_bits<V>(at) * broadcast<V>(patches_.scale[t * ROWS + i]), false);
        }
  }

  // One bit a lane.
  template <class Mask>
  static INLINE uint32_t lanes(Mask mask) {
#if VECTOR_BYTES == 64
    if constexpr (sizeof(Real) == 4)
      return _mm512_movepi32_mask(bits<__m512i>(mask));
    else
      return _mm512_movepi64_mask(bits<__m512i>(mask));
#elif VECTOR_BYTES == 32
    if constexpr (sizeof(Real) == 4)
      return static_cast<uint32_t>(_mm256_movemask_ps(bits<__m256>(mask)));
    else
      return static_cast<uint32_t>(_mm256_movemask_pd(bits<__m256d>(mask)));
#else
    uint32_t all = 0;
    for (int i = 0; i < L; ++i) all |= static_cast<uint32_t>(mask[i] != 0) << i;
    return all;
#endif
  }

  // The direct form of a patch and a prototype.
  double distance(int64_t slot, int q) const {
    const bool wide = args_.verify || patches_.odd[slot] || panel_.odd[q];
    return wide ? direct<double>(args_.metric, patches_, slot, panel_, q)
                : direct<Real>(args_.metric, patches_, slot, panel_, q);
  }

  struct Pair {
    int64_t slot;
    int q;
  };
  struct Candidate {
    double distance = 0;
    int64_t slot = -1;
  };

  const PrototypeSearch& args_;
  const Winners winners_;
  const Screen kind_;
  const bool keeps_;  // candidates, to be measured
  PatchRows<T> patches_;
  Panel<T> panel_;
  double error_;
  std::vector<Pair> maybe_;
  Buffer<Real> score_buffer_;
};

template <class T>
void search_tasks(const PrototypeSearch& args, const SearchPlan& plan, const Winners& winners, Screen kind,
                  int64_t begin, int64_t end) {
  PrototypeSearcher<T> searcher(args, winners, kind);
  for (int64_t i = begin; i < end; ++i) searcher.run(plan.task(i));
}

template <class Real>
constexpr int64_t panel_size() {
  return WIDE * LANES<Real>;
}

// log((d + 1) / (d + eps)) as k·log 2 + 2·atanh(s), |s| < 0.172, without a difference that could cancel.
INLINE Vector<double> log_ratio(Vector<double> d, double eps) {
  using V = Vector<double>;
  using I = Vector<int64_t>;
  const V over = d + 1, under = d + eps;
  const V ratio = over / under;
  // The exponent of the ratio over √½, so that what is left lies around 1.
  const I exponent = (bits<I>(ratio * broadcast<V>(std::sqrt(2.0))) >> 52) - 1023;
  const V power = bits<V>((exponent + 1023) << 52);
  const V near = __builtin_convertvector(exponent, V);
  const I none = exponent == 0;
  const V s = (none ? broadcast<V>(1 - eps) : over - power * under) / (over + power * under);
  const V square = s * s;
  V series = broadcast<V>(1.0 / 23);
#pragma GCC unroll 11
  for (int term = 21; term > 0; term -= 2) series = fma(series, square, broadcast<V>(1.0 / term));
  const V value = fma(near, broadcast<V>(0.69314718055994530942), 2 * s * series);
  constexpr double MAX = std::numeric_limits<double>::max(), INF = std::numeric_limits<double>::infinity();
  const V beyond = ratio == 0 ? broadcast<V>(-INF) : ratio > MAX ? ratio : broadcast<V>(NAN);
  return d > MAX ? V{} : (ratio > 0) & (ratio <= MAX) ? value : beyond;
}

// Brings the parts together and writes the results of winners [begin, end), counted over (sample, prototype).
template <class Real>
void finish(const PrototypeSearch& args, const Winners& winners, int64_t parts, int64_t begin, int64_t end) {
  const int64_t rows = args.shape.samples * args.shape.prototypes, topk = args.shape.topk;
  for (int64_t row = begin; row < end; ++row)
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t j = 0; j < topk; ++j) {
        const int64_t from = (part * rows + row) * topk + j;
        if (winners.index[from] >= 0) winners.offer(row, winners.distance[from], winners.index[from]);
      }
  constexpr int L = LANES<double>;
  Real* const out = static_cast<Real*>(args.distance);
  Real* const activated = static_cast<Real*>(args.activated);
  for (int64_t i = begin * topk; i < end * topk; i += L) {
    const int count = static_cast<int>(std::min<int64_t>(L, end * topk - i));
    double d[L] = {}, a[L];
    for (int j = 0; j < count; ++j) {
      const double value = winners.distance[i + j];
      const Real rounded = static_cast<Real>(args.metric == EUCLIDEAN ? std::sqrt(value) : value);
      out[i + j] = rounded, args.index[i + j] = winners.index[i + j], d[j] = rounded;
    }
    if (!activated) continue;
    if (args.activation == LOG) {
      store_bits(a, log_ratio(load_bits<Vector<double>>(d), args.eps), false);
    } else {
      for (int j = 0; j < count; ++j)
        a[j] = args.activation == LINEAR ? -d[j] : args.activation == EXP ? std::exp(-d[j]) : 1 / (d[j] + 1);
    }
    for (int j = 0; j < count; ++j) activated[i + j] = static_cast<Real>(a[j]);
  }
}

// Distances at every patch, in the direct form.
template <class T>
class PrototypeMapper {
 public:
  using Real = typename Memory<T>::Compute;
  static constexpr int L = LANES<Real>, COUNT = WIDE * L;

  explicit PrototypeMapper(const PrototypeMap& args)
      : args_(args),
        patches_(args.shape, args.x, args.metric, Screen::real, args.metric == COSINE, false),
        panel_(patches_, Screen::real, args.metric == COSINE) {}

  void run(const SearchTask& task) {
    each_segment(task, patches_, nullptr, [&] { flush(task); });
  }

 private:
  void flush(const SearchTask& task) {
    for (int64_t p = task.prototypes.first; p < task.prototypes.last; p += COUNT) {
      panel_.pack(static_cast<const T*>(args_.p), p, std::min<int64_t>(COUNT, task.prototypes.last - p));
      for (const Segment& segment : patches_.segments)
        for (int64_t t = 0; t < segment.tiles; ++t) tile(segment, t, p);
    }
    patches_.clear();
  }

  void tile(const Segment& segment, int64_t t, int64_t p) {
    alignas(64) Real out[ROWS * COUNT];
    const Real zero[ROWS] = {};
    const int height = segment.height(t);
    const int64_t slot = (segment.tile + t) * ROWS;
    const auto run = args_.metric == DOT ? &tile_of<Products<Real>, Real> : &tile_of<Squares<Real>, Real>;
    run(height, panel_.width, patches_.rows(segment.tile + t), panel_.cells, patches_.chunks, zero, out);
    for (int q = 0; q < panel_.count; ++q) {
      Real* const to = static_cast<Real*>(args_.distance) +
                       (segment.sample * args_.shape.prototypes + p + q) * args_.shape.patches() + patches_.id[slot];
      for (int i = 0; i < height; ++i) {
        const Real value = out[i * panel_.width * L + q];
        if (patches_.odd[slot + i] || panel_.odd[q]) {
          const double exact = direct<double>(args_.metric, patches_, slot + i, panel_, q);
          to[i] = static_cast<Real>(args_.metric == EUCLIDEAN ? std::sqrt(exact) : exact);
          continue;
        }
        switch (args_.metric) {
          case DOT:
            to[i] = -value;
            break;
          case EUCLIDEAN:
            to[i] = std::sqrt(value);
            break;
          case COSINE:
            to[i] = patches_.inverse[slot + i] == 0 || panel_.inverse[q] == 0 ? 1 : value / 2;
            break;
          default:
            to[i] = value;
        }
      }
    }
  }

  const PrototypeMap& args_;
  PatchRows<T> patches_;
  Panel<T> panel_;
};

template <class T>
void map_tasks(const PrototypeMap& args, const SearchPlan& plan, int64_t begin, int64_t end) {
  PrototypeMapper<T> mapper(args);
  for (int64_t i = begin; i < end; ++i) mapper.run(plan.task(i));
}
