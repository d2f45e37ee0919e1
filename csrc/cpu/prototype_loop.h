// The search for the nearest patches, and their map, by one thread. Included as vector.h is.
//
// Patches are packed by rows, prototypes by panels of WIDE vectors, and a tile of ROWS patches by one panel stays in
// registers over the whole depth. The tile gives the screen, x·p − |x|²/2, whose largest value is the nearest patch; that
// patch is then measured in the direct form.

template <class Real>
constexpr int LANES = VECTOR_BYTES / sizeof(Real);

#if VECTOR_BYTES == 64
constexpr int ROWS = 12;  // 12 × 2 sums, 2 vectors of prototypes and a patch: 27 of 32 registers
#else
constexpr int ROWS = 6;  // 15 of 16
#endif
constexpr int WIDE = 2;

template <class V, int L>
INLINE void transpose(V (&a)[L]) {
  for (int step = 1; step < L; step *= 2) {
    V b[L];
    for (int i = 0; i < L / 2; ++i) {
      b[2 * i] = zip<0>(a[i], a[i + L / 2], std::make_index_sequence<L>());
      b[2 * i + 1] = zip<1>(a[i], a[i + L / 2], std::make_index_sequence<L>());
    }
    for (int i = 0; i < L; ++i) a[i] = b[i];
  }
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

struct Products {
  template <class V>
  static INLINE V add(V total, V x, V p) {
    return fma(x, p, total);
  }
};

struct Squares {
  template <class V>
  static INLINE V add(V total, V x, V p) {
    const V difference = x - p;
    return fma(difference, difference, total);
  }
};

#if VECTOR_BYTES == 64
// Products of pairs of bfloat16, added in float32. By its name, since the instruction set of these loops lacks it.
struct PairProducts {
  static INLINE Vector<float> add(Vector<float> total, Vector<uint32_t> x, Vector<uint32_t> p) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(total) : "v"(x), "v"(p));
    return total;
  }
};
#endif

// out[i][·] = start[i] + Σ over the depth, for H patches and WIDTH vectors of prototypes.
template <class Step, class Real, class Cell, int H, int WIDTH>
void tile(const Cell* rows, const Cell* panel, int64_t chunks, const Real* start, Real* out) {
  using V = Vector<Real>;
  constexpr int L = LANES<Real>;
  V total[H][WIDTH];
#pragma GCC unroll 16
  for (int i = 0; i < H; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < WIDTH; ++j) total[i][j] = broadcast<V>(start[i]);
  for (; chunks > 0; --chunks, rows += ROWS * L)
#pragma GCC unroll 4
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

template <class Step, class Real, class Cell, int WIDTH, size_t... H>
INLINE void tile_of(int height, std::index_sequence<H...>, const Cell* rows, const Cell* panel, int64_t chunks,
                    const Real* start, Real* out) {
  using Run = void (*)(const Cell*, const Cell*, int64_t, const Real*, Real*);
  static constexpr Run RUNS[] = {&tile<Step, Real, Cell, int(H) + 1, WIDTH>...};
  RUNS[height - 1](rows, panel, chunks, start, out);
}

template <class Step, class Real, class Cell>
void tile_of(int height, int width, const Cell* rows, const Cell* panel, int64_t chunks, const Real* start,
                    Real* out) {
  constexpr auto heights = std::make_index_sequence<ROWS>();
  if (width == 1)
    tile_of<Step, Real, Cell, 1>(height, heights, rows, panel, chunks, start, out);
  else
    tile_of<Step, Real, Cell, WIDE>(height, heights, rows, panel, chunks, start, out);
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
  double longest;  // length of a patch
  bool odd;        // holds what the fast form cannot rank: a NaN, or squares out of range

  int height(int64_t i) const { return static_cast<int>(count / tiles + (i < count % tiles)); }
};

template <class T>
class PatchRows {
 public:
  using Real = typename Memory<T>::Compute;
  using V = Vector<Real>;
  static constexpr int L = LANES<Real>;

  // With `unit`, rows are divided by their lengths.
  PatchRows(const PrototypeShape& shape, const FeatureMap& x, Metric metric, bool pairs, bool unit)
      : shape_(shape), x_(x), metric_(metric), pairs_(pairs), unit_(unit), offset_(patch_offsets(shape, x)) {
    depth = static_cast<int64_t>(offset_.size());
    chunks = (depth + L - 1) / L;
    pair_chunks = (chunks + 1) / 2;
    for (int axis = 0; axis < AXES; ++axis) grid_[axis] = shape.grid(axis);
    // About a MiB: enough rows that packing a panel costs little beside using it.
    const int64_t bytes = std::max<int64_t>(1, chunks) * VECTOR_BYTES;
    capacity = std::clamp<int64_t>((int64_t{1} << 20) / (bytes * ROWS), 256 / ROWS, 1024 / ROWS + 1);
    const int64_t slots = capacity * ROWS;
    rows_ = row_buffer_.get(slots * chunks * L);
    if (pairs) pair_rows_ = pair_buffer_.get(slots * pair_chunks * L);
    start = start_buffer_.get(slots), scale = scale_buffer_.get(slots), inverse = inverse_buffer_.get(slots);
    id = id_buffer_.get(slots);
    window_ = shape.window();
  }

  // Packs patches of `sample` from `at` on as one segment, until the rows are full or `end` is reached, and moves `at`.
  // Returns whether there was any.
  bool add(int64_t sample, int64_t& at, int64_t end, const bool* mask) {
    const int64_t room = (capacity - used) * ROWS;
    int64_t count = 0;
    int64_t* const list = id + used * ROWS;
    for (; at < end && count < room; ++at)
      if (!mask || mask[sample * shape_.patches() + at]) list[count++] = at;
    if (count == 0) return false;
    Segment segment{sample, used, (count + ROWS - 1) / ROWS, count, 0, false};
    segments.push_back(segment);
    // From dense to one place a row: the last first, since they only move up.
    int64_t from = count;
    for (int64_t t = segment.tiles - 1; t >= 0; --t)
      for (int i = segment.height(t) - 1; i >= 0; --i) list[t * ROWS + i] = list[--from];
    used += segment.tiles;
    const T* const base = static_cast<const T*>(x_.data) + sample * x_.sample;
    int64_t slot[L], to[L];
    int filled = 0;
    const auto flush = [&] {
      pack(base, to, slot, filled);
      for (int i = 0; i < filled; ++i) measure(slot[i], segments.back());
      filled = 0;
    };
    for (int64_t t = 0; t < segment.tiles; ++t)
      for (int i = 0; i < segment.height(t); ++i) {
        slot[filled] = (segment.tile + t) * ROWS + i;
        to[filled] = place(grid_, x_, id[slot[filled]]);
        if (++filled == L) flush();
      }
    if (filled) flush();
    return true;
  }

  bool full(int64_t more) const { return capacity - used < std::min((more + ROWS - 1) / ROWS, capacity); }
  void clear() { used = 0, segments.clear(); }

  const Real* row(int64_t slot) const { return rows_ + slot / ROWS * (chunks * ROWS * L) + slot % ROWS * L; }
  const Real* rows(int64_t tile) const { return rows_ + tile * (chunks * ROWS * L); }
  const uint32_t* pair_rows(int64_t tile) const { return pair_rows_ + tile * (pair_chunks * ROWS * L); }

  int64_t depth, chunks, pair_chunks, capacity, used = 0;
  std::vector<Segment> segments;
  // By slot (tile · ROWS + row): the patch, where its screen starts, what that is multiplied by, 1 / its length.
  int64_t* id;
  Real *start, *scale, *inverse;

 private:
  // Up to L patches at `to`, into their slots.
  void pack(const T* x, const int64_t* to, const int64_t* slot, int count) {
    Real* out[L];
    for (int i = 0; i < count; ++i) out[i] = const_cast<Real*>(row(slot[i]));
    if (x_.channel == 1 && window_ == 1) {
      for (int i = 0; i < count; ++i)
        each_vector(x + to[i], depth, [&](int64_t d, V value) { store_bits(out[i] + d * ROWS, value, false); });
      return;
    }
    const bool run = count == L && x_.stride[AXES - 1] == 1 && to[L - 1] - to[0] == L - 1 && [&] {
      for (int i = 1; i < L; ++i)
        if (to[i] != to[0] + i) return false;
      return true;
    }();
    for (int64_t c = 0; c < chunks; ++c) {
      V a[L];
      const int64_t left = depth - c * L;
      for (int d = 0; d < L; ++d) {
        if (d >= left) {
          a[d] = V{};
          continue;
        }
        const T* const from = x + offset_[c * L + d];
        if (run) {
          a[d] = Memory<T>::load(from + to[0]);
        } else {
          T some[L] = {};
          for (int i = 0; i < count; ++i) some[i] = from[to[i]];
          a[d] = Memory<T>::load(some);
        }
      }
      transpose(a);
      for (int i = 0; i < count; ++i) store_bits(out[i] + c * ROWS * L, a[i], false);
    }
  }

  void measure(int64_t slot, Segment& segment) {
    const Real* const x = row(slot);
    V total{};
    for (int64_t c = 0; c < chunks; ++c) {
      const V value = load_bits<V>(x + c * ROWS * L);
      total = fma(value, value, total);
    }
    const Real square = sum<Real, L>(total);
    segment.odd |= !in_range(square) && !(square == 0 && zero(x));
    const Real length = std::sqrt(square);
    segment.longest = std::max<double>(segment.longest, length);
    inverse[slot] = square > 0 ? 1 / length : 0;
    Real ranked = square;
    if constexpr (sizeof(Real) == 4 && VECTOR_BYTES == 64) {
      if (pairs_) ranked = round_pairs(x, slot);
    }
    start[slot] = metric_ == COSINE || metric_ == DOT ? 0 : -ranked / 2;
    scale[slot] = ranked > 0 ? 1 / std::sqrt(ranked) : 0;
    if (unit_)
      for (int64_t c = 0; c < chunks; ++c) {
        Real* const at = const_cast<Real*>(x) + c * ROWS * L;
        store_bits(at, load_bits<V>(at) * broadcast<V>(inverse[slot]), false);
      }
  }

  // The row in bfloat16, and the square of its length then.
  float round_pairs(const Real* x, int64_t slot) {
    BFloat16* const to = reinterpret_cast<BFloat16*>(pair_rows_ + slot / ROWS * (pair_chunks * ROWS * L) +
                                                     slot % ROWS * L);
    V total{};
    for (int64_t c = 0; c < 2 * pair_chunks; ++c) {
      BFloat16* const half = to + (c / 2 * ROWS * 2 + c % 2) * L;
      Memory<BFloat16>::store(half, c < chunks ? bits<Vector<float>>(load_bits<V>(x + c * ROWS * L)) : Vector<float>{},
                              false);
      const Vector<float> value = Memory<BFloat16>::load(half);
      total = fma(bits<V>(value), bits<V>(value), total);
    }
    return sum<Real, L>(total);
  }

  bool zero(const Real* x) const {
    for (int64_t c = 0; c < chunks; ++c)
      for (int i = 0; i < L; ++i)
        if (x[c * ROWS * L + i] != 0) return false;
    return true;
  }

 public:
  // Squares that neither overflow nor lose their digits below the smallest number.
  static bool in_range(Real square) {
    return square >= std::numeric_limits<Real>::min() * (sizeof(Real) == 4 ? 1e8 : 1e16) &&
           square <= std::numeric_limits<Real>::max();
  }

 private:
  const PrototypeShape& shape_;
  const FeatureMap& x_;
  const Metric metric_;
  const bool pairs_, unit_;
  const std::vector<int64_t> offset_;
  int64_t grid_[AXES], window_;
  Buffer<Real> row_buffer_, start_buffer_, scale_buffer_, inverse_buffer_;
  Buffer<uint32_t> pair_buffer_;
  Buffer<int64_t> id_buffer_;
  Real* rows_;
  uint32_t* pair_rows_ = nullptr;
};

// Prototypes p[first], …: as rows, for the direct form, and transposed, for the tiles.
template <class T>
class Panel {
 public:
  using Real = typename Memory<T>::Compute;
  using V = Vector<Real>;
  static constexpr int L = LANES<Real>, COUNT = WIDE * L;

  Panel(const PatchRows<T>& patches, bool pairs, bool unit) : patches_(patches), pairs_(pairs), unit_(unit) {
    rows_ = row_buffer_.get(COUNT * patches.chunks * L);
    cells = cell_buffer_.get(COUNT * patches.chunks * L);
    if (pairs) {
      pair_rows_ = pair_row_buffer_.get(COUNT * patches.pair_chunks * L);
      pair_cells = pair_cell_buffer_.get(COUNT * patches.pair_chunks * L);
    }
  }

  void pack(const T* p, int64_t first, int64_t number) {
    count = static_cast<int>(number);
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
      odd[q] = !PatchRows<T>::in_range(square[q]) && !(square[q] == 0 && std::all_of(to, to + padded, [](Real value) {
        return value == 0;
      }));
      length[q] = std::sqrt(square[q]);
      inverse[q] = square[q] > 0 ? 1 / length[q] : 0;
      if (unit_)
        for (int64_t d = 0; d < padded; ++d) to[d] *= inverse[q];
    }
    if constexpr (sizeof(Real) == 4 && VECTOR_BYTES == 64) {
      if (pairs_) return pack_pairs();
    }
    transposed(rows_, patches_.chunks, cells);
  }

  const Real* row(int q) const { return rows_ + q * patches_.chunks * L; }

  int count, width;
  Real* cells;
  uint32_t* pair_cells = nullptr;
  Real square[COUNT], length[COUNT], inverse[COUNT];
  bool odd[COUNT];

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
    const int64_t chunks = patches_.chunks, pair_chunks = patches_.pair_chunks;
    for (int q = 0; q < width * L; ++q)
      for (int64_t c = 0; c < 2 * pair_chunks; ++c)
        Memory<BFloat16>::store(
            reinterpret_cast<BFloat16*>(pair_rows_ + q * pair_chunks * L) + c * L,
            c < chunks ? bits<Vector<float>>(load_bits<V>(rows_ + (q * chunks + c) * L)) : Vector<float>{}, false);
    transposed(pair_rows_, pair_chunks, pair_cells);
  }

  const PatchRows<T>& patches_;
  const bool pairs_, unit_;
  Buffer<Real> row_buffer_, cell_buffer_;
  Buffer<uint32_t> pair_row_buffer_, pair_cell_buffer_;
  Real* rows_;
  uint32_t* pair_rows_ = nullptr;
};

template <class T>
class PrototypeSearcher {
 public:
  using Real = typename Memory<T>::Compute;
  using V = Vector<Real>;
  using Slot = std::conditional_t<sizeof(Real) == 8, int64_t, int32_t>;
  static constexpr int L = LANES<Real>, COUNT = WIDE * L;

  PrototypeSearcher(const PrototypeSearch& args, const Winners& winners, bool pairs)
      : args_(args),
        winners_(winners),
        pairs_(pairs),
        patches_(args.shape, args.x, args.metric, pairs, false),
        panel_(patches_, pairs, false) {
    // Of a sum of depth + 1 products in any order, and of operands rounded to bfloat16.
    const double unit = std::numeric_limits<Real>::epsilon() / 2;
    error_ = 1.01 * (static_cast<double>(patches_.depth) + 8) * unit + (pairs ? 1.01 / 128 : 0);
  }

  void run(const SearchTask& task) {
    for (int64_t b = task.samples.first; b < task.samples.last; ++b)
      for (int64_t p = task.prototypes.first; p < task.prototypes.last; ++p) winners_.clear(row(task.part, b, p));
    for (int64_t b = task.samples.first; b < task.samples.last; ++b)
      for (int64_t at = task.patches.first; at < task.patches.last;) {
        if (patches_.full(task.patches.last - at)) flush(task);
        patches_.add(b, at, task.patches.last, args_.mask);
      }
    flush(task);
  }

 private:
  int64_t row(int64_t part, int64_t b, int64_t p) const {
    return (part * args_.shape.samples + b) * args_.shape.prototypes + p;
  }

  void flush(const SearchTask& task) {
    const bool one = args_.shape.topk == 1 && !args_.verify;
    if (!patches_.segments.empty())
      for (int64_t p = task.prototypes.first; p < task.prototypes.last; p += COUNT) {
        panel_.pack(static_cast<const T*>(args_.p), p, std::min<int64_t>(COUNT, task.prototypes.last - p));
        for (const Segment& segment : patches_.segments) {
          const int64_t first = row(task.part, segment.sample, p);
          if (one)
            nearest(segment, first);
          else
            several(segment, first);
        }
      }
    patches_.clear();
  }

  // Calls use(slot, j, screens) for each patch and vector of prototypes.
  template <class Use>
  INLINE void screen(const Segment& segment, const Use& use) {
    const bool scaled = args_.metric == COSINE;
    const int width = panel_.width;
    for (int64_t t = 0; t < segment.tiles; ++t) {
      const int height = segment.height(t);
      const int64_t slot = (segment.tile + t) * ROWS;
      alignas(64) Real out[ROWS * COUNT];
      run_tile(height, segment.tile + t, patches_.start + slot, out);
      for (int i = 0; i < height; ++i)
        for (int j = 0; j < width; ++j) {
          V value = load_bits<V>(out + (i * width + j) * L);
          if (scaled) value *= broadcast<V>(patches_.scale[slot + i]);
          use(slot + i, j, value);
        }
    }
  }

  INLINE void run_tile(int height, int64_t t, const Real* start, Real* out) {
#if VECTOR_BYTES == 64
    if constexpr (sizeof(Real) == 4)
      if (pairs_)
        return tile_of<PairProducts>(height, panel_.width, patches_.pair_rows(t), panel_.pair_cells,
                                     patches_.pair_chunks, start, out);
#endif
    tile_of<Products>(height, panel_.width, patches_.rows(t), panel_.cells, patches_.chunks, start, out);
  }

  void nearest(const Segment& segment, int64_t first) {
    using Slots = Vector<Slot>;
    Slot slots[COUNT];
    if (!segment.odd) {
      V best[WIDE];
      Slots at[WIDE] = {};
      for (int j = 0; j < WIDE; ++j) best[j] = broadcast<V>(-std::numeric_limits<Real>::infinity());
      screen(segment, [&](int64_t slot, int j, V value) INLINE_LAMBDA {
        const auto better = value > best[j];
        best[j] = better ? value : best[j];
        at[j] = better ? broadcast<Slots>(static_cast<Slot>(slot)) : at[j];
      });
      std::memcpy(slots, at, sizeof(slots));
    }
    for (int q = 0; q < panel_.count; ++q)
      if (segment.odd || panel_.odd[q])
        every(segment, q, first + q);
      else
        winners_.offer(first + q, distance<Real>(slots[q], q), patches_.id[slots[q]]);
  }

  // The best few, or with `verify` all that may be among them.
  void several(const Segment& segment, int64_t first) {
    const int64_t topk = args_.shape.topk;
    constexpr Real NONE_YET = -std::numeric_limits<Real>::infinity();
    alignas(64) Real least[COUNT], slack[COUNT];
    best_.assign(COUNT * topk, NONE_YET);  // of each prototype, in descending order
    found_.resize(COUNT);
    for (int q = 0; q < COUNT; ++q) {
      found_[q].clear();
      // What is odd is not ranked; nothing is above infinity.
      least[q] = q < panel_.count && !panel_.odd[q] ? NONE_YET : -NONE_YET;
      slack[q] = q < panel_.count && args_.verify ? 2 * bound(segment, q) : 0;
    }
    if (!segment.odd)
      screen(segment, [&](int64_t slot, int j, V value) {
        const auto hit = value > load_bits<V>(least + j * L);
        if (!any(hit)) return;
        for (int i = 0; i < L; ++i) {
          if (!hit[i]) continue;
          const int q = j * L + i;
          found_[q].push_back({value[i], slot});
          Real* const best = best_.data() + q * topk;
          int64_t to = topk - 1;
          if (value[i] > best[to]) {
            for (; to > 0 && value[i] > best[to - 1]; --to) best[to] = best[to - 1];
            best[to] = value[i];
          }
          const Real last = best[topk - 1];
          least[q] = slack[q] == 0 ? last : std::nextafter(last - slack[q], NONE_YET);
          if (static_cast<int64_t>(found_[q].size()) > 4 * topk + 64)
            std::erase_if(found_[q], [&](const Found& f) { return slack[q] == 0 ? f.score < last : f.score <= least[q]; });
        }
      });
    for (int q = 0; q < panel_.count; ++q) {
      if (segment.odd || panel_.odd[q]) {
        every(segment, q, first + q);
        continue;
      }
      const Real last = best_[(q + 1) * topk - 1];
      int64_t above = 0;
      for (const Found& f : found_[q]) above += f.score > last;
      for (const Found& f : found_[q]) {
        if (args_.verify) {
          if (f.score > least[q]) winners_.offer(first + q, distance<double>(f.slot, q), patches_.id[f.slot]);
        } else if (f.score > last || (f.score == last && above < topk)) {
          above += f.score == last;  // of equal screens, the first
          winners_.offer(first + q, distance<Real>(f.slot, q), patches_.id[f.slot]);
        }
      }
    }
  }

  void every(const Segment& segment, int q, int64_t to) {
    for (int64_t t = 0; t < segment.tiles; ++t)
      for (int i = 0; i < segment.height(t); ++i) {
        const int64_t slot = (segment.tile + t) * ROWS + i;
        winners_.offer(to, distance<double>(slot, q), patches_.id[slot]);
      }
  }

  // What a screen of the segment may be off by.
  Real bound(const Segment& segment, int q) const {
    const double x = segment.longest, p = panel_.length[q];
    switch (args_.metric) {
      case COSINE:
        return static_cast<Real>(2 * error_ * p);
      case DOT:
        return static_cast<Real>(error_ * x * p);
      default:
        return static_cast<Real>(error_ * x * (x + p));
    }
  }

  template <class Mask>
  static INLINE bool any(Mask mask) {
#if VECTOR_BYTES == 64
    return sizeof(Real) == 4 ? _mm512_movepi32_mask(bits<__m512i>(mask)) : _mm512_movepi64_mask(bits<__m512i>(mask));
#elif VECTOR_BYTES == 32
    return _mm256_movemask_epi8(bits<__m256i>(mask));
#else
    int64_t words[2];
    std::memcpy(words, &mask, sizeof(words));
    return words[0] | words[1];
#endif
  }

  // The direct form of a patch and a prototype, in W.
  template <class W>
  double distance(int64_t slot, int q) const {
    using Wide = typename VectorOf<W, L * sizeof(W)>::type;
    const Real* const x = patches_.row(slot);
    const Real* const p = panel_.row(q);
    const auto get_x = [&](int64_t c) INLINE_LAMBDA {
      return __builtin_convertvector(load_bits<V>(x + c * ROWS * L), Wide);
    };
    const auto get_p = [&](int64_t c) INLINE_LAMBDA { return __builtin_convertvector(load_bits<V>(p + c * L), Wide); };
    Wide total{};
    if (args_.metric == DOT) {
      for (int64_t c = 0; c < patches_.chunks; ++c) total += get_x(c) * get_p(c);
      return -sum<W, L>(total);
    }
    if (args_.metric == COSINE) {
      W of_x = patches_.inverse[slot], of_p = panel_.inverse[q];
      if constexpr (sizeof(W) == 8) {
        Wide xx{}, pp{};
        for (int64_t c = 0; c < patches_.chunks; ++c) xx += get_x(c) * get_x(c), pp += get_p(c) * get_p(c);
        const W square_x = sum<W, L>(xx), square_p = sum<W, L>(pp);
        of_x = square_x == 0 ? 0 : 1 / std::sqrt(square_x), of_p = square_p == 0 ? 0 : 1 / std::sqrt(square_p);
      }
      if (of_x == 0 || of_p == 0) return 1;
      for (int64_t c = 0; c < patches_.chunks; ++c) {
        const Wide difference = get_x(c) * of_x - get_p(c) * of_p;
        total += difference * difference;
      }
      return sum<W, L>(total) / 2;
    }
    for (int64_t c = 0; c < patches_.chunks; ++c) {
      const Wide difference = get_x(c) - get_p(c);
      if constexpr (sizeof(Wide) == VECTOR_BYTES)
        total = fma(difference, difference, total);
      else
        total += difference * difference;
    }
    return sum<W, L>(total);
  }

  struct Found {
    Real score;
    int64_t slot;
  };

  const PrototypeSearch& args_;
  const Winners winners_;
  const bool pairs_;
  PatchRows<T> patches_;
  Panel<T> panel_;
  double error_;
  std::vector<Real> best_;
  std::vector<std::vector<Found>> found_;
};

template <class T>
void search_tasks(const PrototypeSearch& args, const SearchPlan& plan, const Winners& winners, bool pairs,
                  int64_t begin, int64_t end) {
  PrototypeSearcher<T> searcher(args, winners, pairs);
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
      : args_(args), patches_(args.shape, args.x, args.metric, false, args.metric == COSINE),
        panel_(patches_, false, args.metric == COSINE) {}

  void run(const SearchTask& task) {
    for (int64_t b = task.samples.first; b < task.samples.last; ++b)
      for (int64_t at = task.patches.first; at < task.patches.last;) {
        if (patches_.full(task.patches.last - at)) flush(task);
        patches_.add(b, at, task.patches.last, nullptr);
      }
    flush(task);
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
    const auto run = args_.metric == DOT ? &tile_of<Products, Real, Real> : &tile_of<Squares, Real, Real>;
    run(height, panel_.width, patches_.rows(segment.tile + t), panel_.cells, patches_.chunks, zero, out);
    for (int q = 0; q < panel_.count; ++q) {
      Real* const to = static_cast<Real*>(args_.distance) +
                       (segment.sample * args_.shape.prototypes + p + q) * args_.shape.patches() + patches_.id[slot];
      for (int i = 0; i < height; ++i) {
        const Real value = out[i * panel_.width * L + q];
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
