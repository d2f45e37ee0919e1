// Distances from one point to many, eight at a time, to the bit as protofast/_ops/selection.py lays them down; and
// sums. Included as vector.h is.

INLINE Eight roots(Eight value) {
#if VECTOR_BYTES == 64
  return bits<Eight>(_mm512_sqrt_pd(bits<__m512d>(value)));
#else
  for (int i = 0; i < 8; ++i) value[i] = std::sqrt(value[i]);
  return value;
#endif
}

template <class T>
void fill_panel(const Cloud& cloud, const int64_t* list, Panel& panel, int64_t begin, int64_t end) {
  std::vector<double> x(cloud.width());
  for (int64_t g = begin; g < end; ++g) {
    double* const to = panel.coordinates.get() + g * 8 * panel.dim;
    for (int64_t i = 0; i < 8; ++i) {
      const int64_t at = g * 8 + i;
      if (at < panel.count)
        coordinates<T>(cloud, list ? list[at] : at, x.data());
      else
        std::fill(x.begin(), x.end(), 0.0);
      for (int64_t c = 0; c < panel.dim; ++c) to[c * 8 + i] = x[c];
    }
  }
}

// Of dim coordinates, or of panel.dim where that is 0. A value is at least 0, so that no 0 that is left out of the
// lanes would change it.
template <bool manhattan, int dim>
INLINE Eight eight_values(const double* group, const double* x, int64_t depth) {
  Eight t[8]{};
  int64_t c = 0;
  if constexpr (dim > 0) {
#pragma GCC unroll 8
    for (int i = 0; i < dim; ++i) t[i] = term<manhattan>(broadcast<Eight>(x[i]) - eight(group + i * 8));
  } else {
    for (; c + 8 <= depth; c += 8)
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) t[i] += term<manhattan>(broadcast<Eight>(x[c + i]) - eight(group + (c + i) * 8));
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
      if (c + i < depth) t[i] += term<manhattan>(broadcast<Eight>(x[c + i]) - eight(group + (c + i) * 8));
  }
  constexpr auto plus = [](Eight a, Eight b, int from) INLINE_LAMBDA { return dim == 0 || dim > from ? a + b : a; };
  const Eight a = plus(t[0], t[4], 4), b = plus(t[1], t[5], 5), e = plus(t[2], t[6], 6), f = plus(t[3], t[7], 7);
  return plus(plus(a, e, 2), plus(b, f, 3), 1);
}

enum class Form { value, root, half };

template <Form form, bool manhattan, int dim>
void measure_groups(const Panel& panel, const double* x, int64_t begin, int64_t end, double* to) {
  for (int64_t g = begin; g < end; ++g) {
    const Eight value = eight_values<manhattan, dim>(panel.group(g), x, panel.dim);
    keep(to + g * 8, form == Form::root ? roots(value) : form == Form::half ? value / 2 : value);
  }
}

template <Form form, bool manhattan>
INLINE void measure_groups(const Panel& panel, const double* x, int64_t begin, int64_t end, double* to) {
  switch (panel.dim) {
    case 1:
      return measure_groups<form, manhattan, 1>(panel, x, begin, end, to);
    case 2:
      return measure_groups<form, manhattan, 2>(panel, x, begin, end, to);
    case 3:
      return measure_groups<form, manhattan, 3>(panel, x, begin, end, to);
    case 4:
      return measure_groups<form, manhattan, 4>(panel, x, begin, end, to);
    default:
      return measure_groups<form, manhattan, 0>(panel, x, begin, end, to);
  }
}

inline void panel_values(const Panel& panel, const double* x, int64_t begin, int64_t end, double* to) {
  if (panel.manhattan) return measure_groups<Form::value, true>(panel, x, begin, end, to);
  measure_groups<Form::value, false>(panel, x, begin, end, to);
}

inline void panel_distances(const Panel& panel, const double* x, int64_t begin, int64_t end, double* to) {
  if (panel.measure == Measure::euclidean) return measure_groups<Form::root, false>(panel, x, begin, end, to);
  if (panel.measure == Measure::cosine) return measure_groups<Form::half, false>(panel, x, begin, end, to);
  panel_values(panel, x, begin, end, to);
}

inline void panel_pull(const Panel& panel, const double* x, const double* distances, double least, int64_t begin,
                       int64_t end, double* g) {
  std::vector<double> sums(panel.dim * 8);
  for (int64_t at = begin; at < end; ++at) {
    Eight by{};
    for (int64_t i = 0; i < 8 && at * 8 + i < panel.count; ++i)
      if (distances[at * 8 + i] > least) by[i] = 1 / distances[at * 8 + i];
    for (int64_t c = 0; c < panel.dim; ++c)
      keep(&sums[c * 8], eight(&sums[c * 8]) + (broadcast<Eight>(x[c]) - eight(panel.group(at) + c * 8)) * by);
  }
  for (int64_t c = 0; c < panel.dim; ++c) g[c] += sum<double, 8>(eight(&sums[c * 8]));
}

inline void panel_slopes(const Panel& panel, const double* x, const double* g, int64_t begin, int64_t end, double* dot,
                         double* size) {
  for (int64_t at = begin; at < end; ++at) {
    Eight product{}, total{};
    for (int64_t c = 0; c < panel.dim; ++c) {
      const Eight gap = eight(panel.group(at) + c * 8) - broadcast<Eight>(x[c]);
      product += gap * broadcast<Eight>(g[c]), total += term<true>(gap);
    }
    keep(dot + at * 8, product), keep(size + at * 8, total);
  }
}

template <class T>
void read_row(const Cloud& cloud, int64_t from, int64_t begin, int64_t end, double* to) {
  const T* const row = static_cast<const T*>(cloud.data) + cloud.at(from) * cloud.row;
  for (int64_t i = begin; i < end; ++i) to[i] = static_cast<double>(row[cloud.at(i) * cloud.column]);
}

// The lanes by halves.
inline double sum_lanes(double* lanes) {
  for (int64_t half = SUM_LANES / 2; half > 4; half /= 2)
    for (int64_t i = 0; i < half; i += 8) keep(lanes + i, eight(lanes + i) + eight(lanes + i + half));
  return sum<double, 8>(eight(lanes));
}

// Adds terms, of which the first has this number, to the lanes.
inline void add_terms(const double* terms, int64_t first, int64_t count, double* lanes) {
  int64_t i = 0;
  for (; i < count && (first + i) % 8; ++i) lanes[(first + i) % SUM_LANES] += terms[i];
  for (; i + 8 <= count; i += 8) {
    double* const lane = lanes + (first + i) % SUM_LANES;
    keep(lane, eight(lane) + eight(terms + i));
  }
  for (; i < count; ++i) lanes[(first + i) % SUM_LANES] += terms[i];
}

template <class T>
double row_sum(const Cloud& cloud, int64_t from, const int64_t* list, int64_t count, double* lanes) {
  const T* const row = static_cast<const T*>(cloud.data) + cloud.at(from) * cloud.row;
  std::fill_n(lanes, SUM_LANES, 0.0);
  for (int64_t i = 0; i < count; ++i)
    lanes[i % SUM_LANES] += static_cast<double>(row[cloud.at(list[i]) * cloud.column]);
  return sum_lanes(lanes);
}

// `first` is a multiple of eight.
inline void swap_gains(const double* distances, const double* nearest, const double* second, const int32_t* labels,
                       int64_t first, int64_t count, double* lanes, double* spared) {
  const int64_t end = first + count;
  int64_t i = first;
  for (; i + 8 <= end; i += 8) {
    const Eight d = eight(distances + i), near = eight(nearest + i), far = eight(second + i);
    const auto closer = d < far;
#if VECTOR_BYTES == 64
    unsigned hits = _mm512_cmp_pd_mask(bits<__m512d>(d), bits<__m512d>(far), _CMP_LT_OQ);
    if (!hits) continue;
#else
    unsigned hits = 0;
    for (int j = 0; j < 8; ++j) hits |= static_cast<unsigned>(closer[j] != 0) << j;
    if (!hits) continue;
#endif
    double* const lane = lanes + i % SUM_LANES;
    const Eight gain = near - d;
    keep(lane, eight(lane) + (gain > 0 ? gain : Eight{}));
    const Eight saved = far - (d > near ? d : near);
    for (; hits; hits &= hits - 1) {
      const int j = std::countr_zero(hits);
      spared[labels[i + j]] += saved[j];
    }
    static_cast<void>(closer);
  }
  for (; i < end; ++i) {
    const double d = distances[i];
    if (!(d < second[i])) continue;
    if (d < nearest[i]) lanes[i % SUM_LANES] += nearest[i] - d;
    spared[labels[i]] += second[i] - std::max(d, nearest[i]);
  }
}

// Sums of distances, nearly: tiles of float32. The rows of block `begin` with all members from there on, which gives
// the sums of both (the members of the first `rows` alone are wanted).
template <bool manhattan>
void sum_tiles_of(const RoundedMembers& members, int64_t block, int64_t rows, double* sums) {
  using F = Vector<float>;
  constexpr int L = LANES<float>, PANEL = WIDE * L;
  static constexpr float zero[ROWS] = {};
  const int64_t first = block * TILE_BLOCK, last = std::min(members.count, first + TILE_BLOCK);
  const int64_t chunks = members.depth / L;
  alignas(64) float out[ROWS * PANEL];
  for (int64_t i = first; i < last; i += ROWS) {
    const int height = static_cast<int>(std::min<int64_t>(ROWS, last - i));
    double total[ROWS] = {};
    F part[ROWS]{};
    int parts = 0;
    const auto flush = [&] {
      for (int r = 0; r < height; ++r) total[r] += sum<float, L>(part[r]), part[r] = F{};
      parts = 0;
    };
    for (int64_t j = first; j < members.count; j += PANEL) {
      const float* const left = members.rows.get() + i * members.depth;
      const float* const right = members.panels.get() + j * members.depth;
      tile_of<std::conditional_t<manhattan, Gaps<float>, Squares<float>>, float>(height, WIDE, left, right, chunks,
                                                                                 zero, out);
      const bool whole = j + PANEL <= members.count, both = j >= last && j < rows;
      F down[WIDE]{};
      for (int r = 0; r < height; ++r)
        for (int w = 0; w < WIDE; ++w) {
          float* const at = out + (r * WIDE + w) * L;
          F length = load_bits<F>(at);
          if constexpr (!manhattan) length = square_root(length);
          if (!whole) {
            for (int64_t lane = 0; lane < L; ++lane)
              if (j + w * L + lane >= members.count) length[lane] = 0;
          }
          part[r] += length, down[w] += length;
        }
      if (both)
        for (int w = 0; w < WIDE; ++w) {
          alignas(64) float some[L];
          store_bits(some, down[w], false);
          for (int64_t lane = 0; lane < L && j + w * L + lane < members.count; ++lane)
            sums[j + w * L + lane] += some[lane];
        }
      if (++parts == 16) flush();
    }
    flush();
    for (int r = 0; r < height; ++r) sums[i + r] += total[r];
  }
}

template <bool manhattan>
void tile_lengths_of(const RoundedMembers& members, const float* rows, int64_t height, int64_t begin, int64_t end,
                     float* to, int64_t stride) {
  using F = Vector<float>;
  constexpr int L = LANES<float>, PANEL = WIDE * L;
  static constexpr float zero[ROWS] = {};
  alignas(64) float out[ROWS * PANEL];
  for (int64_t p = begin; p < end; ++p)
    for (int64_t i = 0; i < height; i += ROWS) {
      const int some = static_cast<int>(std::min<int64_t>(ROWS, height - i));
      tile_of<std::conditional_t<manhattan, Gaps<float>, Squares<float>>, float>(
          some, WIDE, rows + i * members.depth, members.panels.get() + p * PANEL * members.depth, members.depth / L,
          zero, out);
      for (int r = 0; r < some; ++r)
        for (int w = 0; w < WIDE; ++w) {
          const F length = load_bits<F>(out + (r * WIDE + w) * L);
          float* const at = to + (i + r) * stride + p * PANEL + w * L;
          if constexpr (manhattan)
            store_bits(at, length, false);
          else
            store_bits(at, square_root(length), false);
        }
    }
}

inline void tile_lengths(const RoundedMembers& members, const float* rows, int64_t height, int64_t begin, int64_t end,
                         float* to, int64_t stride) {
  members.manhattan ? tile_lengths_of<true>(members, rows, height, begin, end, to, stride)
                    : tile_lengths_of<false>(members, rows, height, begin, end, to, stride);
}

// Both fall as a distance grows, so that the least it can be gives the most they can be.
inline double most_gains(const ScreenedGains& with, const float* lengths, int64_t count, double* spared) {
  using F = Vector<float>;
  constexpr int L = LANES<float>;
  const F shrink = broadcast<F>(with.shrink), missed = broadcast<F>(with.missed);
  double gain = 0;
  for (int64_t first = 0; first < count; first += L) {
    const F least = load_bits<F>(lengths + first) * shrink - missed, reach = load_bits<F>(with.reach + first);
#if VECTOR_BYTES == 64
    uint64_t hits = _mm512_cmp_ps_mask(bits<__m512>(least), bits<__m512>(reach), _CMP_LT_OQ);
#elif VECTOR_BYTES == 32
    uint64_t hits =
        static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(bits<__m256>(least), bits<__m256>(reach), _CMP_LT_OQ)));
#else
    uint64_t hits = 0;
    for (int i = 0; i < L; ++i) hits |= uint64_t{least[i] < reach[i]} << i;
#endif
    if (!hits) continue;
    alignas(64) float some[L];
    store_bits(some, least, false);
    for (; hits; hits &= hits - 1) {
      const int lane = std::countr_zero(hits);
      const int64_t o = first + lane;
      double d = std::max(0.0F, some[lane]) * with.by;
      if (with.measure == Measure::sqeuclidean) d = d * d;
      if (with.measure == Measure::cosine) d = d * d / 2;
      gain += std::max(0.0, with.nearest[o] - d);
      spared[with.labels[o]] += std::max(0.0, with.second[o] - std::max(d, with.nearest[o]));
    }
  }
  return gain;
}

inline void sum_tiles(const RoundedMembers& members, int64_t block, int64_t rows, double* sums) {
  members.manhattan ? sum_tiles_of<true>(members, block, rows, sums) : sum_tiles_of<false>(members, block, rows, sums);
}

constexpr int64_t SUM_PANEL = WIDE * LANES<float>, SUM_VECTOR = LANES<float>, SUM_ROWS = ROWS;
