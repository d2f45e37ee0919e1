// Many centers against many points: screened by tiles of rounded coordinates, and only what may be nearer than the
// nearest so far is measured. Included as vector.h is.
//
// With x̃ and c̃ the rounded coordinates, |x − c| ≥ |x̃ − c̃| − |x − x̃| − |c − c̃|.

constexpr float TINY = 1e-15F;  // more than what underflow takes from a length, as the longest is about one

// A row in float32; returns its largest size.
template <class T>
INLINE float round_row(const Cloud& cloud, const Rounding& rounding, int64_t position, float* to) {
  using F = Vector<float>;
  constexpr int L = LANES<float>;
  const Row<T> row(cloud, position);
  int64_t c = 0;
  F peak{};
  const auto look = [&](F v) INLINE_LAMBDA {
    const F size = v < 0 ? -v : v;
    peak = size > peak ? size : peak;
  };
  if constexpr (std::is_same_v<T, float>)
    if (row.column == 1 && !row.cosine)
      for (const F scale = broadcast<F>(static_cast<float>(rounding.scale)); c + L <= row.dim; c += L) {
        const F v = fma(load_bits<F>(row.from + c), scale, load_bits<F>(rounding.as_float.data() + c));
        store_bits(to + c, v, false);
        look(v);
      }
  if (c == row.dim && c == rounding.depth) return largest<float, L>(peak);
  const int64_t first = c;
  for (; c < row.dim; c += 8) {
    const Eight x = row.chunk(c) * rounding.scale + eight(rounding.shift.data() + c);
    keep(to + c, __builtin_convertvector(x, EightFloats));
  }
  std::fill(to + row.dim, to + rounding.depth, 0.0F);
  for (c = first; c < rounding.depth; c += L) look(load_bits<F>(to + c));
  return largest<float, L>(peak);
}

// What rounding to float32 takes from a length, where each coordinate is off by at most its 2⁻²⁴th.
constexpr float ROUNDED = 0x1.1p-24F;

#if VECTOR_BYTES == 64
// From float32 to bytes, `plus` added.
INLINE ByteRow bytes_of(const float* from, int64_t depth, float most, float missed, int plus, uint8_t* to) {
  using F = Vector<float>;
  F square{}, lost{};
  const float step = most / 127;
  const F per = broadcast<F>(most > 0 ? 127 / most : 0), by = broadcast<F>(-step);
  for (int64_t c = 0; c < depth; c += 16) {
    const F v = load_bits<F>(from + c);
    const __m512i whole = _mm512_cvtps_epi32(bits<__m512>(v * per));
    const F back = bits<F>(_mm512_cvtepi32_ps(whole)), rest = fma(back, by, v);
    lost = fma(rest, rest, lost), square = fma(back, back, square);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + c),
                     _mm512_cvtepi32_epi8(_mm512_add_epi32(whole, _mm512_set1_epi32(plus))));
  }
  return {step, step * step * sum<float, 16>(square), std::sqrt(sum<float, 16>(lost)) * 1.0001F + missed};
}
#endif

// Centers as points, whose coordinates are those of unit vectors already.
inline Cloud cloud_of(const Centers& centers, int64_t dim, bool manhattan) {
  return {centers.coordinates.data(),
          centers.width,
          1,
          centers.count,
          dim,
          manhattan ? Measure::manhattan : Measure::euclidean,
          nullptr,
          nullptr};
}

// Rounds the centers that have come since the last time.
inline void round_centers(const Rounding& rounding, Centers& centers) {
  const int64_t depth = rounding.depth;
  int64_t number = std::ssize(centers.missed);
  centers.rows.resize(centers.count * depth), centers.missed.resize(centers.count);
  if (rounding.bytes) centers.bytes.resize(centers.count * depth), centers.byte_rows.resize(centers.count);
  const Cloud all = cloud_of(centers, rounding.dim, rounding.manhattan);
  for (; number < centers.count; ++number) {
    float* const row = centers.rows.data() + number * depth;
    [[maybe_unused]] const float most = round_row<double>(all, rounding, number, row);
    double size = 0;
    for (int64_t c = 0; c < depth; ++c) size += rounding.manhattan ? std::abs(row[c]) : double{row[c]} * row[c];
    centers.missed[number] = static_cast<float>(rounding.manhattan ? size : std::sqrt(size)) * ROUNDED + TINY;
    if (centers.width > rounding.dim)  // the direction of zero vectors is left out
      centers.missed[number] += static_cast<float>(centers.at(number)[rounding.dim] * rounding.scale);
#if VECTOR_BYTES == 64
    if (rounding.bytes)
      centers.byte_rows[number] =
          bytes_of(row, depth, most, 2 * centers.missed[number], 128, centers.bytes.data() + number * depth);
#endif
  }
}

// One thread's.
template <class T>
class Screener {
  static constexpr int L = LANES<float>, PANEL = WIDE * L, BLOCK = 240;  // a multiple of ROWS
  using F = Vector<float>;

 public:
  Screener(const Cloud& cloud, const Rounding& rounding, const Centers& centers, const Nearest& near)
      : cloud_(cloud), rounding_(rounding), centers_(centers), near_(near) {
    const int64_t depth = rounding.depth;
    floats_ = room<float>(PANEL * depth), panel_ = room<uint32_t>(PANEL * depth), score_ = room<float>(BLOCK * PANEL);
  }

  // The listed centers, ascending.
  void use(const int32_t* list, int64_t count) {
    const int64_t depth = rounding_.depth;
    list_ = list, count_ = count;
    by_bytes_ = rounding_.bytes && count >= FEW && !cloud_.manhattan() && cloud_.dim <= MOST_BYTES;
    cells_ = by_bytes_ ? (cloud_.dim + 3) / 4 : cloud_.dim;
    if (by_bytes_ && !whole_) whole_ = room<uint8_t>(PANEL * depth);
    const void* const rows = by_bytes_ ? static_cast<const void*>(centers_.bytes.data()) : centers_.rows.data();
    const int64_t width = by_bytes_ ? depth / 4 : depth;
    grow(rows_, row_room_, (count + ROWS - 1) / ROWS * ROWS * cells_);
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t* const from = static_cast<const uint32_t*>(rows) + list[i] * width;
      uint32_t* const to = rows_.get() + i / ROWS * ROWS * cells_ + i % ROWS;
      for (int64_t c = 0; c < cells_; ++c) to[c * ROWS] = from[c];
    }
    missed_of_.resize(count), square_of_.resize(count), step_of_.resize(count);
    worst_ = 0;
    for (int64_t i = 0; i < count; ++i) {
      missed_of_[i] = centers_.missed[list[i]];
      if (by_bytes_) {
        const ByteRow& row = centers_.byte_rows[list[i]];
        missed_of_[i] = row.missed, square_of_[i] = row.square * LESS, step_of_[i] = -2 * row.step;
      }
      worst_ = std::max(worst_, missed_of_[i]);
    }
  }

  void relax(const int64_t* positions, int64_t begin, int64_t end) {
    for (; begin < end; begin += PANEL) {
      const int count = static_cast<int>(std::min<int64_t>(PANEL, end - begin));
      for (int i = 0; i < count; ++i) position_[i] = positions ? positions[begin + i] : begin + i;
      for (int64_t i = begin + PANEL; positions && i < std::min(end, begin + 2 * PANEL); ++i) prefetch(positions[i]);
      pack(count);
      for (int64_t first = 0; first < count_; first += BLOCK) {
        const int64_t last = std::min(count_, first + BLOCK);
        const int wide = count > L ? 2 : 1;
        score(first, last, wide);
        decide(first, last, wide);
      }
    }
  }

 private:
  static constexpr int64_t FEW = 24;              // centers for which bytes do not pay
  static constexpr int64_t MOST_BYTES = 1 << 14;  // coordinates whose squares in bytes float32 adds up exactly
  static constexpr float LESS = 1 - 2e-6F;        // what float32 may add to a score made of bytes
  template <class N>
  using Room = std::unique_ptr<N[], void (*)(void*)>;
  template <class N>
  static Room<N> room(int64_t count) {
    const size_t bytes = (std::max<int64_t>(count, 1) * sizeof(N) + 63) / 64 * 64;
    return {static_cast<N*>(std::aligned_alloc(64, bytes)), &std::free};
  }
  template <class N>
  static void grow(Room<N>& has, int64_t& size, int64_t count) {
    if (count > size) has = room<N>(count), size = count;
  }

  void prefetch(int64_t position) const {
    const char* const row =
        reinterpret_cast<const char*>(static_cast<const T*>(cloud_.data) + cloud_.at(position) * cloud_.row);
    const int64_t bytes = std::min<int64_t>(cloud_.dim * int64_t(sizeof(T)), 1024);
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at);
  }

  void pack(int count) {
    const int64_t depth = rounding_.depth;
    open_ = 0;
    for (int i = 0; i < PANEL; ++i) {
      if (i >= count) {
        bound_[i] = missed_[i] = step_[i] = square_[i] = 0, start_[i] = 0;
        continue;
      }
      float* const row = floats_.get() + i * depth;
      const float most = round_row<T>(cloud_, rounding_, position_[i], row);
      missed_[i] = most * longest_ * ROUNDED + TINY, step_[i] = square_[i] = 0;
      // The direction of zero vectors is left out.
      if (cloud_.cosine() && cloud_.norms[position_[i]] == 0) missed_[i] += static_cast<float>(rounding_.scale);
#if VECTOR_BYTES == 64
      if (by_bytes_) {
        const ByteRow found = bytes_of(row, depth, most, missed_[i], 0, whole_.get() + i * depth);
        missed_[i] = found.missed, step_[i] = found.step, square_[i] = found.square * LESS;
        __m512i total = _mm512_setzero_si512();
        for (int64_t c = 0; c < depth; c += 64)
          total = add_bytes(total, load_bits<__m512i>(whole_.get() + i * depth + c));
        start_[i] = -128 * sum<int32_t, 16>(bits<Vector<int32_t>>(total));
      }
#endif
      bind(i);
    }
    for (int j = 0; j < WIDE; ++j) {
      const F value = load_bits<F>(bound_ + j * L);
      const F length = cloud_.manhattan() ? value : square_root(value);
      store_bits(bound_ + j * L, length * (1 + 1e-6F) + TINY, false);
    }
    if (by_bytes_)
      transposed(reinterpret_cast<const uint32_t*>(whole_.get()), depth / 4, count);
    else
      transposed(reinterpret_cast<const uint32_t*>(floats_.get()), depth, count);
  }

#if VECTOR_BYTES == 64
  static INLINE __m512i add_bytes(__m512i total, __m512i whole) {
    const __m512i ones = _mm512_set1_epi8(1);
    asm("vpdpbusd %2, %1, %0" : "+v"(total) : "v"(ones), "v"(whole));
    return total;
  }
#endif

  // Cells (of four bytes) of rows, (PANEL, cells), as (cells, lanes of a panel).
  void transposed(const uint32_t* rows, int64_t cells, int count) {
    using U = Vector<uint32_t>;
    const int wide = count > L ? 2 : 1;
    uint32_t* const to = panel_.get();
    for (int j = 0; j < wide; ++j)
      for (int64_t c = 0; c * L < cells_; ++c) {
        U square[L];
        for (int i = 0; i < L; ++i)
          square[i] = j * L + i < count ? load_bits<U>(rows + (j * L + i) * cells + c * L) : U{};
        transpose(square);
        for (int i = 0; i < L; ++i) store_bits(to + (c * L + i) * wide * L + j * L, square[i], false);
      }
  }

  // Whether a center may be nearer to lane i, and its value so far, scaled.
  void bind(int i) {
    const double value = near_.value[position_[i]];
    if (value > 0)
      open_ |= uint64_t{1} << i;
    else
      open_ &= ~(uint64_t{1} << i);
    bound_[i] =
        static_cast<float>(cloud_.manhattan() ? value * rounding_.scale : value * rounding_.scale * rounding_.scale);
  }

  // Of the centers [first, last), squared lengths (manhattan: lengths) between the rounded coordinates, and the least.
  void score(int64_t first, int64_t last, int wide) {
    const F all = broadcast<F>(std::numeric_limits<float>::infinity());
    store_bits(least_, all, false), store_bits(least_ + L, all, false);
    for (int64_t i = first; i < last; i += ROWS) {
      const int height = static_cast<int>(std::min<int64_t>(ROWS, last - i));
      float* const out = score_.get() + (i - first) * wide * L;
      if (by_bytes_)
        score_bytes(i, height, wide, out);
      else
        score_floats(i, height, wide, out);
    }
  }

  void score_floats(int64_t i, int height, int wide, float* out) {
    static constexpr float zero[ROWS] = {};
    const float* const rows = reinterpret_cast<const float*>(rows_.get()) + i * cells_;
    const float* const panel = reinterpret_cast<const float*>(panel_.get());
    if (cloud_.manhattan())
      tile_of<Gaps<float>, float, true>(height, wide, rows, panel, cells_, zero, out);
    else
      tile_of<Squares<float>, float, true>(height, wide, rows, panel, cells_, zero, out);
    for (int j = 0; j < wide; ++j) {
      F least = load_bits<F>(least_ + j * L);
      for (int r = 0; r < height; ++r) {
        const F s = load_bits<F>(out + (r * wide + j) * L);
        least = s < least ? s : least;
      }
      store_bits(least_ + j * L, least, false);
    }
  }

  void score_bytes(int64_t i, int height, int wide, float* out) {
#if VECTOR_BYTES == 64
    int32_t* const whole = reinterpret_cast<int32_t*>(out);
    tile_of<ByteProducts, uint32_t, true>(height, wide, rows_.get() + i * cells_, panel_.get(), cells_, start_, whole);
    for (int j = 0; j < wide; ++j) {
      const F step = load_bits<F>(step_ + j * L), own = load_bits<F>(square_ + j * L);
      F least = load_bits<F>(least_ + j * L);
      for (int r = 0; r < height; ++r) {
        float* const at = out + (r * wide + j) * L;
        const F product = __builtin_convertvector(load_bits<Vector<int32_t>>(at), F);
        const F s = fma(product * step, broadcast<F>(step_of_[i + r]), own + broadcast<F>(square_of_[i + r]));
        store_bits(at, s, false);
        least = s < least ? s : least;
      }
      store_bits(least_ + j * L, least, false);
    }
#endif
  }

  // Measures what may be nearer.
  void decide(int64_t first, int64_t last, int wide) {
    const bool manhattan = cloud_.manhattan();
    const F above = broadcast<F>(above_), worst = broadcast<F>(worst_);
    // From the lengths under which a center must be, the scores over which none need be looked at.
    for (int j = 0; j < wide; ++j) {
      const F least = load_bits<F>(least_ + j * L), missed = load_bits<F>(missed_ + j * L);
      const F score = (least > 0 ? least : F{}) * (1 + 6e-6F) + load_bits<F>(square_ + j * L) * 6e-6F;
      const F near = (manhattan ? score : square_root(score)) * above + worst + missed;
      const F bound = load_bits<F>(bound_ + j * L), length = ((near < bound ? near : bound) + missed) * above;
      const F reach = length + worst * above;
      store_bits(length_ + j * L, length, false);
      store_bits(limit_ + j * L, manhattan ? reach : reach * reach * above, false);
    }
    for (int64_t i = first; i < last; ++i) {
      const float* const scores = score_.get() + (i - first) * wide * L;
      uint64_t hits = lanes_not_over(load_bits<F>(scores), load_bits<F>(limit_));
      if (wide > 1) hits |= lanes_not_over(load_bits<F>(scores + L), load_bits<F>(limit_ + L)) << L;
      for (hits &= open_; hits; hits &= hits - 1) {
        const int lane = std::countr_zero(hits);
        const float reach = length_[lane] + missed_of_[i] * above_;
        if (scores[lane] <= (manhattan ? reach : reach * reach * above_)) measure_lane(lane, list_[i]);
      }
    }
  }

  static INLINE uint64_t lanes_not_over(F s, F most) {
#if VECTOR_BYTES == 64
    return _mm512_cmp_ps_mask(bits<__m512>(s), bits<__m512>(most), _CMP_LE_OQ);
#elif VECTOR_BYTES == 32
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(bits<__m256>(s), bits<__m256>(most), _CMP_LE_OQ)));
#else
    uint64_t found = 0;
    for (int i = 0; i < L; ++i) found |= uint64_t{s[i] <= most[i]} << i;
    return found;
#endif
  }

  void measure_lane(int i, int32_t number) {
    const int64_t position = position_[i];
    const double measured = value<T>(cloud_, position, centers_.at(number));
    if (!(measured < near_.value[position])) return;
    near_.value[position] = measured, near_.label[position] = number;
    bind(i);
    bound_[i] = (cloud_.manhattan() ? bound_[i] : std::sqrt(bound_[i])) * (1 + 1e-6F) + TINY;
    length_[i] = std::min(length_[i], (bound_[i] + missed_[i]) * above_);
    const float reach = length_[i] + worst_ * above_;
    limit_[i] = cloud_.manhattan() ? reach : reach * reach * above_;
  }

  const Cloud& cloud_;
  const Rounding& rounding_;
  const Centers& centers_;
  const Nearest& near_;
  int64_t cells_ = 0, row_room_ = 0, count_ = 0;  // cells of four bytes in a row
  const int32_t* list_ = nullptr;
  bool by_bytes_ = false;
  const float above_ = 1 + static_cast<float>(cloud_.dim + 8) * 0x1p-23F;  // rounding of a sum over the coordinates
  // The length of a row whose coordinates are all one.
  const float longest_ =
      cloud_.manhattan() ? static_cast<float>(cloud_.dim) : std::sqrt(static_cast<float>(cloud_.dim));
  float worst_ = 0;  // of what rounding took from the centers
  std::vector<float> missed_of_, square_of_, step_of_;
  uint64_t open_ = 0;  // lanes for which a center may be nearer
  int64_t position_[PANEL];
  alignas(64) float bound_[PANEL], length_[PANEL], limit_[PANEL], least_[PANEL], missed_[PANEL], step_[PANEL],
      square_[PANEL];
  alignas(64) int32_t start_[PANEL];
  Room<float> floats_{nullptr, &std::free}, score_{nullptr, &std::free};
  Room<uint32_t> panel_{nullptr, &std::free}, rows_{nullptr, &std::free};
  Room<uint8_t> whole_{nullptr, &std::free};
};

// The meetings [begin, end).
template <class T>
void meet(const Cloud& cloud, const Rounding& rounding, const Centers& centers, const Nearest& near,
          const int64_t* positions, const Meeting* meetings, int64_t begin, int64_t end) {
  Screener<T> screener(cloud, rounding, centers, near);
  for (const Meeting* last = nullptr; begin < end; ++begin) {
    const Meeting& now = meetings[begin];
    if (!last || now.centers != last->centers || now.count != last->count) screener.use(now.centers, now.count);
    screener.relax(positions, now.begin, now.end);
    last = &now;
  }
}

// Values between center `from` and those of [begin, end).
inline void between(const Centers& centers, bool manhattan, int64_t from, int64_t begin, int64_t end, double* to) {
  const Cloud all = cloud_of(centers, centers.width, manhattan);
  for (; begin < end; ++begin) *to++ = value<double>(all, begin, centers.at(from));
}
