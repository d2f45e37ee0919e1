// Patches and prototypes as the tiles take them, and the direct form of one of each. Included as vector.h is.

// Patches of one sample that lie together in the packed rows: tiles of nearly one height.
struct Segment {
  int64_t sample, tile, tiles, count;
  int low, taller;  // patches of a tile, and how many tiles have one more
  // Patches that the fast forms cannot rank, by a NaN or squares out of range, and where they are listed.
  int64_t odd, first_odd;
  double longest;  // square of the others' longest
  bool by_bytes;   // whether bytes will do

  int height(int64_t i) const { return low + (i < taller); }
};

#if VECTOR_BYTES == 64
// Vectors value(0), …, value(chunks − 1) in whole multiples of a step, from −127 to 127, which use(c, multiples) takes.
struct InBytes {
  float step, most, square, missed;  // the largest value; squares of the lengths, and of what is missed
};

template <class Value, class Use>
INLINE InBytes round_to_bytes(int64_t chunks, const Value& value, const Use& use) {
  using F = Vector<float>;
  F peak{}, square{}, missed{};
  for (int64_t c = 0; c < chunks; ++c) {
    const F v = value(c), size = v < 0 ? -v : v;
    peak = size > peak ? size : peak;
    square = fma(v, v, square);
  }
  const float most = largest<float, LANES<float>>(peak), step = most / 127;
  const F per = broadcast<F>(most > 0 ? 127 / most : 0), by = broadcast<F>(-step);
  for (int64_t c = 0; c < chunks; ++c) {
    const F v = value(c);
    const __m512i whole = _mm512_cvtps_epi32(bits<__m512>(v * per));
    const F rest = fma(bits<F>(_mm512_cvtepi32_ps(whole)), by, v);
    missed = fma(rest, rest, missed);
    use(c, whole);
  }
  return {step, most, sum<float, LANES<float>>(square), sum<float, LANES<float>>(missed)};
}
#endif

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
        out_[n] = row(slot_[n]);
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

  Real* row(int64_t slot) const { return rows_ + slot / ROWS * (chunks * ROWS * L) + slot % ROWS * L; }
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
    const bool squared = is_squared(metric_);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t s = slot_[i];
      Real* const x = row(s);
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
          Real* const at = x + c * ROWS * L;
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
    uint8_t* const to = reinterpret_cast<uint8_t*>(cell_row(slot));
    const InBytes row = round_to_bytes(
        chunks,
        [&](int64_t c)
            INLINE_LAMBDA { return bits<F>(load_bits<V>(x + c * ROWS * L)) - bits<F>(load_bits<V>(centre + c * L)); },
        [&](int64_t c, __m512i whole) INLINE_LAMBDA {
          _mm_storeu_si128(reinterpret_cast<__m128i*>(to + (c / 4 * ROWS * 4 + c % 4) * L),
                           _mm512_cvtepi32_epi8(_mm512_add_epi32(whole, _mm512_set1_epi32(128))));
        });
    const bool squared = is_squared(metric_), cosine = metric_ == COSINE;
    byte_scale[slot] = cosine ? row.step * inverse[slot] : row.step;
    missed[slot] = std::sqrt(cosine ? (row.square > 0 ? row.missed / row.square : 0) : row.missed);
    byte_start[slot] = squared ? -row.square / 2 : 0;
    byte_reach[slot] = cosine ? 1 : std::sqrt(row.square), byte_square[slot] = squared ? row.square : 0;
    segment.by_bytes &= fit_for_bytes(row.square, row.most);
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
      const Real square = sum<Real, L>(total);
      odd[q] = !PatchRows<T>::in_range(square) &&
               !(square == 0 && std::all_of(to, to + padded, [](Real value) { return value == 0; }));
      length[q] = std::sqrt(square);
      inverse[q] = square > 0 ? 1 / length[q] : 0;
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
  Real length[COUNT], inverse[COUNT];
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
    std::fill_n(small_rows_, width * L * byte_chunks * L, 0);
    for (int q = 0; q < width * L; ++q) {
      int8_t* const to = reinterpret_cast<int8_t*>(small_rows_ + q * byte_chunks * L);
      Vector<int32_t> total{};
      F squares{};
      const InBytes row = round_to_bytes(
          q < count ? chunks : 0,
          [&](int64_t c) INLINE_LAMBDA {
            return bits<F>(load_bits<V>(rows_ + (q * chunks + c) * L)) - bits<F>(load_bits<V>(patches_.centre + c * L));
          },
          [&](int64_t c, __m512i whole) INLINE_LAMBDA {
            const F back = bits<F>(_mm512_cvtepi32_ps(whole));
            squares = fma(back, back, squares);
            total += bits<Vector<int32_t>>(whole);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + c * L), _mm512_cvtepi32_epi8(whole));
          });
      step[q] = row.step;
      start[q] = -128 * sum<int32_t, LANES<int32_t>>(total);
      lost[q] = std::sqrt(double{row.missed});
      kept[q] = row.step * std::sqrt(double{sum<float, LANES<float>>(squares)});
      by_bytes &= odd[q] || PatchRows<T>::fit_for_bytes(row.square, row.most);
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
