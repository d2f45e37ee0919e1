// Pairs of points that may be the farthest: tiles of rounded coordinates, and the values of what is left. Included as
// vector.h is.
//
// With x̃ and ỹ the rounded coordinates, |x − y| ≤ |x̃ − ỹ| + |x − x̃| + |y − ỹ|; and |x − y| ≤ |x − c| + |y − c|.

template <class T>
double pair_value(const Cloud& cloud, int64_t position, const double* center) {
  return value<T>(cloud, position, center);
}

template <class T, bool manhattan>
INLINE Key pair_values(const Cloud& cloud, const double* center, int64_t begin, int64_t end, double* to) {
  Key best;
  for (int64_t i = begin; i < end; ++i) {
    const Key key{value_of<T, manhattan>(cloud, i, center), i};
    if (to) to[i] = key.value;
    if (key.over(best)) best = key;
  }
  return best;
}

template <class T>
Key pair_values(const Cloud& cloud, const double* center, int64_t begin, int64_t end, double* to) {
  return cloud.manhattan() ? pair_values<T, true>(cloud, center, begin, end, to)
                           : pair_values<T, false>(cloud, center, begin, end, to);
}

// A row in float32; returns what rounding took from it at most. More than underflow takes is added.
template <class T>
float pair_round(const Cloud& cloud, const PairPlan& plan, int64_t position, float* to) {
  const Row<T> row(cloud, position);
  Eight total{};
  for (int64_t c = 0; c < cloud.dim; c += 8) {
    const Eight x = row.chunk(c) * plan.scale + eight(plan.shift.data() + c);
    keep(to + c, __builtin_convertvector(x, EightFloats));
    total += plan.manhattan ? term<true>(x) : term<false>(x);
  }
  // Padding is 0, and so is the direction of zero vectors: there are none here.
  std::fill(to + cloud.dim, to + plan.depth, 0.0F);
  const double size = sum<double, 8>(total);
  return static_cast<float>(plan.manhattan ? size : std::sqrt(size)) * 0x1.1p-24F + 1e-15F;
}

// The length of a difference, as float32 sums it.
inline float pair_gap(const float* a, const float* b, int64_t depth, bool manhattan) {
  using F = Vector<float>;
  constexpr int L = LANES<float>;
  F total{};
  for (int64_t c = 0; c < depth; c += L) {
    const F x = load_bits<F>(a + c), y = load_bits<F>(b + c);
    total = manhattan ? Gaps<float>::add(total, x, y) : Squares<float>::add(total, x, y);
  }
  const float size = sum<float, L>(total);
  return manhattan ? size : std::sqrt(size);
}

INLINE double pair_product(const float* a, const float* b, int64_t depth) {
  Eight total{};
  for (int64_t c = 0; c < depth; c += 8) total += eight(a + c) * eight(b + c);
  return sum<double, 8>(total);
}

// Between the directions of a and b at most; where rounding could tell another, π.
inline double pair_angle(const float* a, const float* b, int64_t depth) {
  constexpr double pi = 3.1415926535897932;
  const double square = pair_product(a, a, depth) * pair_product(b, b, depth);
  if (!(square > 1e-60)) return pi;
  const double cosine = pair_product(a, b, depth) / std::sqrt(square);
  return std::acos(std::clamp(cosine, -1.0, 1.0)) + 1e-6;  // sums are off by less than 1e-12, angles by its root
}

#if VECTOR_BYTES == 64
INLINE void pair_bytes(PairPlan& plan, int64_t slot, const float* from, int8_t* to) {
  using F = Vector<float>;
  F peak{}, square{}, lost{};
  for (int64_t c = 0; c < plan.depth; c += 16) {
    const F v = load_bits<F>(from + c), size = v < 0 ? -v : v;
    peak = size > peak ? size : peak;
  }
  const float most = largest<float, 16>(peak), step = most > 0 ? most / 127 : 1;
  const F per = broadcast<F>(most > 0 ? 127 / most : 0), by = broadcast<F>(-step);
  __m512i total = _mm512_setzero_si512();
  for (int64_t c = 0; c < plan.depth; c += 16) {
    const F v = load_bits<F>(from + c);
    const __m512i whole = _mm512_cvtps_epi32(bits<__m512>(v * per));
    const F back = bits<F>(_mm512_cvtepi32_ps(whole)), rest = fma(back, by, v);
    lost = fma(rest, rest, lost), square = fma(back, back, square);
    total = _mm512_add_epi32(total, whole);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + c), _mm512_cvtepi32_epi8(whole));
  }
  plan.steps[slot] = step, plan.squares[slot] = step * step * sum<float, 16>(square);
  plan.missed[slot] += std::sqrt(sum<float, 16>(lost)) * 1.0001F;
  plan.starts[slot] = -128 * sum<int32_t, 16>(bits<Vector<int32_t>>(total));
}
#endif

// Writes a cell's panels; `rows` are the rounded rows, of which the slots have the numbers row_of_slot.
template <class T>
void pair_pack(const Cloud& cloud, PairPlan& plan, const PairCell& cell, const float* rows,
               const int64_t* row_of_slot) {
  const int64_t panel = plan.panel, depth = plan.depth;
  std::vector<double> exact(cloud.width());
  std::vector<int8_t> whole(depth);
  for (int64_t i = 0; i < cell.count; ++i) {
    const int64_t slot = cell.first + i, first = slot / panel * panel, lane = slot - first;
    const float* const row = rows + row_of_slot[slot] * depth;
    if (plan.form == PairPlan::Form::exact) {
      coordinates<T>(cloud, plan.positions[slot], exact.data());
      for (int64_t c = 0; c < plan.dim; ++c) plan.panels<double>()[first * plan.dim + c * panel + lane] = exact[c];
    } else if (plan.form == PairPlan::Form::floats) {
      for (int64_t c = 0; c < depth; ++c) plan.panels<float>()[first * depth + c * panel + lane] = row[c];
    } else {
#if VECTOR_BYTES == 64
      pair_bytes(plan, slot, row, whole.data());
      const int64_t cells = depth / 4;
      for (int64_t c = 0; c < cells; ++c)
        std::memcpy(plan.panels<uint32_t>() + first * cells + c * panel + lane, whole.data() + 4 * c, 4);
#endif
    }
  }
}

// One thread's.
template <class T>
class PairSearch {
  static constexpr int L = LANES<float>, PANEL = WIDE * L;
  using F = Vector<float>;

 public:
  PairSearch(const Cloud& cloud, const PairPlan& plan, BestPair& best)
      : cloud_(cloud), plan_(plan), best_(best), row_(cloud.width()) {
    // Sums of d terms in float32, in any order.
    slack_ = static_cast<float>(plan.dim + 8) * 0x1p-23F;
  }

  // A cell with itself and all after it, which have smaller norms.
  void run(int64_t number) {
    const PairCell& from = plan_.cells[number];
    bool packed = false;
    for (int64_t other = number; other < std::ssize(plan_.cells); ++other) {
      look();
      const PairCell& to = plan_.cells[other];
      if (from.norm + to.norm < need_) break;
      const float* const middles = plan_.middles.data();
      const float apart = other == number ? 0
                                          : pair_gap(middles + number * plan_.depth, middles + other * plan_.depth,
                                                     plan_.depth, plan_.manhattan);
      if (apart * (1 + slack_) + from.reach + to.reach < need_) continue;
      if (other != number && !opposite(from, to, number, other)) continue;
      if (plan_.form == PairPlan::Form::exact) {
        meet_exact(from, to);
      } else {
        if (!packed) pack(from), packed = true;
        meet(from, to);
      }
    }
  }

 private:
  // What a pair must reach now; returns whether that has changed.
  bool look() {
    const double value = best_.value();
    if (value == seen_) return false;
    seen_ = value;
    need_ = static_cast<float>(cloud_.length(value) * plan_.scale) * (1 - 1e-6F);
    return true;
  }

  // Whether points at these distances from the center can be far enough apart, by the angle between them.
  bool opposite(const PairCell& from, const PairCell& to, int64_t number, int64_t other) const {
    if (plan_.manhattan || from.angle + to.angle >= 3) return true;
    const float* const middles = plan_.middles.data();
    const double angle =
        from.angle + to.angle + pair_angle(middles + number * plan_.depth, middles + other * plan_.depth, plan_.depth);
    if (angle >= 3.1415926535) return true;
    // Convex in either distance, so the most is at an end.
    const double a = from.norm, b = to.norm, both = a * a + b * b - 2 * a * b * std::cos(angle);
    return std::max({a * a, b * b, both}) >= need_ * need_;
  }

  // Slots of `from` that may be far enough from one with norm `norm`: the first so many.
  int64_t enough(const PairCell& from, float norm) const {
    const float* const norms = plan_.norms.data() + from.first;
    return std::partition_point(norms, norms + from.count, [&](float n) { return n + norm >= need_; }) - norms;
  }

  void offer(int64_t slot, int64_t other) {
    if (slot == other) return;
    const int64_t position = plan_.positions[other];
    if (slot != decoded_) coordinates<T>(cloud_, plan_.positions[slot], row_.data()), decoded_ = slot;
    best_.offer(plan_.positions[slot], position, value<T>(cloud_, position, row_.data()));
  }

  template <bool manhattan, int dim>
  void meet_of(const PairCell& from, const PairCell& to) {
    const double* const data = plan_.panels<double>();
    for (int64_t first = to.first; first < to.first + to.count; first += 8) {
      const int64_t count = enough(from, plan_.norms[first]);
      if (count == 0) return;
      const uint64_t used = (uint64_t{1} << std::min<int64_t>(8, to.first + to.count - first)) - 1;
      Eight y[dim];
      for (int c = 0; c < dim; ++c) y[c] = eight(data + first * dim + c * 8);
      for (int64_t slot = from.first; slot < from.first + count; ++slot) {
        const double* const x = data + slot / 8 * 8 * dim + slot % 8;
        Eight t[8]{};
#pragma GCC unroll 8
        for (int c = 0; c < dim; ++c) t[c] = term<manhattan>(broadcast<Eight>(x[c * 8]) - y[c]);
        // As lanes are added up: a value is at least 0, so that no 0 that is left out would change it.
        constexpr auto plus = [](Eight a, Eight b, bool both) INLINE_LAMBDA { return both ? a + b : a; };
        const Eight a = plus(t[0], t[4], dim > 4), b = plus(t[1], t[5], dim > 5), c = plus(t[2], t[6], dim > 6),
                    d = plus(t[3], t[7], dim > 7);
        const Eight values = plus(plus(a, c, dim > 2), plus(b, d, dim > 3), dim > 1);
        uint64_t hits = lanes_not_under(values, best_.value()) & used;
        for (; hits; hits &= hits - 1) {
          const int lane = std::countr_zero(hits);
          if (slot != first + lane) best_.offer(plan_.positions[slot], plan_.positions[first + lane], values[lane]);
        }
      }
      look();
    }
  }

  template <bool manhattan, size_t... D>
  void meet_exact(const PairCell& from, const PairCell& to, std::index_sequence<D...>) {
    using Run = void (PairSearch::*)(const PairCell&, const PairCell&);
    static constexpr Run RUNS[] = {&PairSearch::meet_of<manhattan, int(D) + 1>...};
    (this->*RUNS[plan_.dim - 1])(from, to);
  }

  void meet_exact(const PairCell& from, const PairCell& to) {
    constexpr auto dims = std::make_index_sequence<8>();
    plan_.manhattan ? meet_exact<true>(from, to, dims) : meet_exact<false>(from, to, dims);
  }

  // Rows as tiles take them.
  void pack(const PairCell& cell) {
    const bool bytes = plan_.form == PairPlan::Form::bytes;
    const int64_t cells = bytes ? plan_.depth / 4 : plan_.depth;
    const int64_t tiles = (cell.count + ROWS - 1) / ROWS;
    rows_.resize(tiles * ROWS * cells);
    for (int64_t i = 0; i < cell.count; ++i) {
      const int64_t slot = cell.first + i;
      const uint32_t* const from = plan_.panels<uint32_t>() + slot / PANEL * PANEL * cells + slot % PANEL;
      uint32_t* const to = rows_.data() + i / ROWS * ROWS * cells + i % ROWS * L;
      // A byte plus 128, as unsigned.
      for (int64_t c = 0; c < cells; ++c) to[c / L * ROWS * L + c % L] = from[c * PANEL] ^ (bytes ? 0x80808080 : 0);
    }
  }

  void meet(const PairCell& from, const PairCell& to) {
    const bool bytes = plan_.form == PairPlan::Form::bytes;
    const int64_t chunks = (bytes ? plan_.depth / 4 : plan_.depth) / L;
    alignas(64) float out[ROWS * PANEL];
    for (int64_t first = to.first; first < to.first + to.count; first += PANEL) {
      const uint64_t used = ~uint64_t{0} >> (64 - std::min<int64_t>(PANEL, to.first + to.count - first));
      limit(from, first);
      int64_t count = enough(from, plan_.norms[first]);
      if (count == 0) return;
      for (int64_t i = 0; i < count; i += ROWS) {
        const int height = static_cast<int>(std::min<int64_t>(ROWS, count - i));
        const uint32_t* const rows = rows_.data() + i * chunks * L;
        const uint32_t* const panel = plan_.panels<uint32_t>() + first * chunks * L;
        static constexpr float zero[ROWS] = {};
        const float* const left = reinterpret_cast<const float*>(rows);
        const float* const right = reinterpret_cast<const float*>(panel);
        if (plan_.manhattan) {
          tile_of<Gaps<float>, float>(height, WIDE, left, right, chunks, zero, out);
        } else if (!bytes) {
          tile_of<Squares<float>, float>(height, WIDE, left, right, chunks, zero, out);
        } else {
#if VECTOR_BYTES == 64
          tile_of<ByteProducts, uint32_t>(height, WIDE, rows, panel, chunks, plan_.starts.data() + first,
                                          reinterpret_cast<int32_t*>(out));
#endif
        }
        bool hit = false;
        for (int r = 0; r < height; ++r)
          for (int j = 0; j < WIDE; ++j) {
            const F score = load_bits<F>(out + (r * WIDE + j) * L);
            uint64_t hits = far(from.first + i + r, score, j) & used >> (j * L);
            hit |= hits != 0;
            for (; hits; hits &= hits - 1) offer(from.first + i + r, first + j * L + std::countr_zero(hits));
          }
        if (hit && look()) limit(from, first), count = std::min(count, enough(from, plan_.norms[first]));
      }
    }
  }

  // What the slots of a panel need, from any row of a cell.
  void limit(const PairCell& from, int64_t first) {
    for (int i = 0; i < PANEL; ++i) {
      const int64_t slot = first + i;
      limit_[i] = need_ - plan_.missed[slot];
      if (plan_.form != PairPlan::Form::bytes) continue;
      const float least = std::max(0.0F, limit_[i] - from.missed), by = 1 / plan_.steps[slot];
      scaled_[i] = (plan_.squares[slot] * (1 + 1e-5F) - least * least) * by, step_[i] = by;
    }
  }

  // Lanes of vector j of the panel that may be far enough from a slot.
  uint64_t far(int64_t slot, F score, int j) const {
    if (plan_.form == PairPlan::Form::bytes) {
      // |x̃−ỹ|² = |x̃|² + |ỹ|² − 2 x̃·ỹ, where x̃·ỹ are the two steps times an integer. The sums of float32 are off by
      // less than 1e-5 of the squares.
      const float half = 0.5F / plan_.steps[slot];
      const F product = __builtin_convertvector(bits<Vector<int32_t>>(score), F);
      const F most = fma(broadcast<F>(plan_.squares[slot] * (1 + 1e-5F) * half), load_bits<F>(step_ + j * L),
                         load_bits<F>(scaled_ + j * L) * broadcast<F>(half));
      return lanes_not_under(most, product);
    }
    F least = load_bits<F>(limit_ + j * L) - broadcast<F>(plan_.missed[slot]);
    least = least > 0 ? least : F{};
    const F below = broadcast<F>(std::max(0.0F, 1 - slack_));
    return lanes_not_under(score, (plan_.manhattan ? least : least * least) * below);
  }

  static INLINE uint64_t lanes_not_under(F a, F b) {
#if VECTOR_BYTES == 64
    return _mm512_cmp_ps_mask(bits<__m512>(a), bits<__m512>(b), _CMP_GE_OQ);
#elif VECTOR_BYTES == 32
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(bits<__m256>(a), bits<__m256>(b), _CMP_GE_OQ)));
#else
    uint64_t found = 0;
    for (int i = 0; i < L; ++i) found |= uint64_t{a[i] >= b[i]} << i;
    return found;
#endif
  }

  static INLINE uint64_t lanes_not_under(Eight a, double b) {
#if VECTOR_BYTES == 64
    return _mm512_cmp_pd_mask(bits<__m512d>(a), _mm512_set1_pd(b), _CMP_GE_OQ);
#else
    uint64_t found = 0;
    for (int i = 0; i < 8; ++i) found |= uint64_t{a[i] >= b} << i;
    return found;
#endif
  }

  const Cloud& cloud_;
  const PairPlan& plan_;
  BestPair& best_;
  std::vector<double> row_;
  int64_t decoded_ = -1;  // the slot whose coordinates are in row_
  std::vector<uint32_t> rows_;
  double seen_ = -1;
  float need_ = 0, slack_;
  alignas(64) float limit_[PANEL], scaled_[PANEL], step_[PANEL];
};

template <class T>
void pair_search(const Cloud& cloud, const PairPlan& plan, BestPair& best, std::atomic<int64_t>& next) {
  PairSearch<T> search(cloud, plan, best);
  for (int64_t number; (number = next++) < std::ssize(plan.cells);) search.run(number);
}

constexpr int64_t PAIR_PANEL = WIDE * LANES<float>;
