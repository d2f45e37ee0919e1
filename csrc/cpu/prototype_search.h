// The search for the nearest patches, by one thread. Included as vector.h is.
//
// A tile gives the screen, x·p − |x|²/2, whose largest value is the nearest patch; that patch, and with it all that the
// screen cannot tell from it, is then measured in the direct form.

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
    if (kind == Screen::bytes && is_squared(args.metric)) centre();
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
    const bool squared = is_squared(args_.metric);
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
      const bool squared = is_squared(of.args_.metric);
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
