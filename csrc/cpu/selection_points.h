// Values between points and centers, to the bit as protofast/_ops/selection.py lays them down. Included as vector.h is.

// One point, eight coordinates at a time.
template <class T>
struct Row {
  const T* from;
  int64_t column, dim;
  double norm;
  bool cosine;

  Row(const Cloud& cloud, int64_t position)
      : from(static_cast<const T*>(cloud.data) + cloud.at(position) * cloud.row),
        column(cloud.column),
        dim(cloud.dim),
        norm(cloud.cosine() ? cloud.norms[position] : 1),
        cosine(cloud.cosine()) {}

  INLINE Eight chunk(int64_t c) const {
    Eight x;
    if (column == 1 && c + 8 <= dim) {
      x = eight(from + c);
    } else {
      T some[8] = {};
      for (int64_t i = c; i < std::min(dim, c + 8); ++i) some[i - c] = from[i * column];
      x = eight(some);
    }
    if (cosine) {
      x = x / (norm > 0 ? norm : 1);
      if (dim - c < 8) x[dim - c] = norm > 0 ? 0 : 1;
    }
    return x;
  }
};

template <class T>
void coordinates(const Cloud& cloud, int64_t position, double* to) {
  const Row<T> row(cloud, position);
  for (int64_t c = 0; c < cloud.width(); c += 8) keep(to + c, row.chunk(c));
}

template <bool manhattan>
INLINE Eight term(Eight gap) {
  if constexpr (manhattan) return gap < 0 ? -gap : gap;
  return gap * gap;
}

// The fast way for rows in one run.
template <class T, bool manhattan>
INLINE double value_of(const Cloud& cloud, int64_t position, const double* center) {
  const Row<T> row(cloud, position);
  Eight total{};
  int64_t c = 0;
  if (row.column == 1 && !row.cosine)
    for (; c + 8 <= row.dim; c += 8) total += term<manhattan>(eight(row.from + c) - eight(center + c));
  for (const int64_t width = cloud.width(); c < width; c += 8)
    total += term<manhattan>(row.chunk(c) - eight(center + c));
  return sum<double, 8>(total);
}

template <class T>
INLINE double value(const Cloud& cloud, int64_t position, const double* center) {
  return cloud.manhattan() ? value_of<T, true>(cloud, position, center) : value_of<T, false>(cloud, position, center);
}

// Norms of all positions of [begin, end).
template <class T>
void measure_norms(const Cloud& cloud, double* norms, int64_t begin, int64_t end) {
  Cloud raw = cloud;
  raw.measure = Measure::euclidean;
  const double* const zero = static_cast<double*>(std::calloc(cloud.width(), sizeof(double)));
  for (int64_t i = begin; i < end; ++i) norms[i] = std::sqrt(value<T>(raw, i, zero));
  std::free(const_cast<double*>(zero));
}

// A further center against the positions of [begin, end), or those of a list; the farthest of them afterwards.
template <class T, bool manhattan>
INLINE Key measure_some(const Cloud& cloud, const double* center, int64_t number, const int64_t* list, int64_t begin,
                        int64_t end, const Nearest& near) {
  Key best;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t position = list ? list[i] : i;
    const double measured = value_of<T, manhattan>(cloud, position, center);
    double& nearest = near.value[position];
    if (measured < nearest) nearest = measured, near.label[position] = number;
    const Key key{nearest, position};
    if (key.over(best)) best = key;
  }
  return best;
}

template <class T>
Key measure(const Cloud& cloud, const double* center, int64_t number, const int64_t* list, int64_t begin, int64_t end,
            const Nearest& near) {
  if (cloud.manhattan()) return measure_some<T, true>(cloud, center, number, list, begin, end, near);
  return measure_some<T, false>(cloud, center, number, list, begin, end, near);
}
