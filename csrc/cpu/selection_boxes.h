// A choice against boxes of near points, whose coordinates lie axis by axis. Included as vector.h is.
//
// Rounding keeps order, so a bound that is taken from the sides of a box as values are taken from points is at most the
// value of any point inside, to the last bit.

// Axes of the points [begin, end), (count, axes), as float32 where that holds them.
template <class T, class Real>
void read_axes(const Cloud& cloud, int64_t begin, int64_t end, Real* to) {
  const int64_t axes = cloud.dim + cloud.cosine();
  if (!cloud.cosine()) {
    for (; begin < end; ++begin, to += axes) {
      const T* const from = static_cast<const T*>(cloud.data) + cloud.at(begin) * cloud.row;
      for (int64_t c = 0; c < axes; ++c) to[c] = static_cast<Real>(from[c * cloud.column]);
    }
    return;
  }
  std::vector<double> one(cloud.width());
  for (; begin < end; ++begin, to += axes) {
    coordinates<T>(cloud, begin, one.data());
    for (int64_t c = 0; c < axes; ++c) to[c] = static_cast<Real>(one[c]);
  }
}

template <bool manhattan, int axes>
INLINE Eight value_of_axes(Eight (&gap)[axes]) {
#pragma GCC unroll 8
  for (int c = 0; c < axes; ++c) gap[c] = term<manhattan>(gap[c]);
  int count = axes;
#pragma GCC unroll 3
  for (int half = 4; half >= 1; half /= 2) {
#pragma GCC unroll 4
    for (int c = 0; c + half < count; ++c) gap[c] += gap[c + half];
    count = std::min(count, half);
  }
  return gap[0];
}

template <class Mask>
INLINE unsigned lanes_of(Mask mask) {
#if VECTOR_BYTES == 64
  return _mm512_movepi64_mask(bits<__m512i>(mask));
#elif VECTOR_BYTES == 32
  __m256d half[2];
  std::memcpy(half, &mask, sizeof(mask));
  return _mm256_movemask_pd(half[0]) | _mm256_movemask_pd(half[1]) << 4;
#else
  unsigned lanes = 0;
  for (int lane = 0; lane < 8; ++lane) lanes |= static_cast<unsigned>(mask[lane] != 0) << lane;
  return lanes;
#endif
}

// Writes the numbers, from `first`, of the lanes that are true.
template <class Mask>
INLINE int64_t which(Mask mask, int64_t first, int32_t* found, int64_t count) {
  for (unsigned lanes = lanes_of(mask); lanes; lanes &= lanes - 1)
    found[count++] = static_cast<int32_t>(first + std::countr_zero(lanes));
  return count;
}

// Eight points' coordinates, axis by axis.
template <class T, int axes>
INLINE void eight_points(const T* from, int64_t row, int64_t column, Eight (&x)[axes]) {
  if (row == axes && column == 1) {  // without gaps: what the compiler knows of the strides
    for (int lane = 0; lane < 8; ++lane)
#pragma GCC unroll 8
      for (int c = 0; c < axes; ++c) x[c][lane] = static_cast<double>(from[lane * axes + c]);
    return;
  }
  for (int lane = 0; lane < 8; ++lane)
#pragma GCC unroll 8
    for (int c = 0; c < axes; ++c) x[c][lane] = static_cast<double>(from[lane * row + c * column]);
}

// `measure` of selection_points.h for few axes: eight points at a time, where they follow one another.
template <class T, bool manhattan, int axes>
Key measure_axes(const Cloud& cloud, const double* center, int64_t number, const int64_t* list, int64_t begin,
                 int64_t end, const Nearest& near) {
  Key best;
  for (const T* const all = static_cast<const T*>(cloud.data); !list && !cloud.rows && begin + 8 <= end; begin += 8) {
    Eight gap[axes];
    eight_points(all + begin * cloud.row, cloud.row, cloud.column, gap);
#pragma GCC unroll 8
    for (int c = 0; c < axes; ++c) gap[c] -= broadcast<Eight>(center[c]);
    const Eight measured = value_of_axes<manhattan, axes>(gap), before = eight(near.value + begin);
    const Eight after = measured < before ? measured : before;
    if (unsigned lanes = lanes_of(measured < before)) {
      keep(near.value + begin, after);
      for (; lanes; lanes &= lanes - 1) near.label[begin + std::countr_zero(lanes)] = number;
    }
    for (unsigned lanes = lanes_of(after > broadcast<Eight>(best.value)); lanes; lanes &= lanes - 1) {
      const int lane = std::countr_zero(lanes);
      if (const Key key{after[lane], begin + lane}; key.over(best)) best = key;
    }
  }
  const Key last = measure_some<T, manhattan>(cloud, center, number, list, begin, end, near);
  return last.over(best) ? last : best;
}

using MeasureLoop = Key (*)(const Cloud&, const double*, int64_t, const int64_t*, int64_t, int64_t, const Nearest&);

template <class T>
MeasureLoop measure_loop(const Cloud& cloud) {
  MeasureLoop found = &measure<T>;
  const auto fill = [&]<int count>() {
    if (cloud.dim == count && !cloud.cosine())
      found = cloud.manhattan() ? &measure_axes<T, true, count> : &measure_axes<T, false, count>;
  };
  [&]<int... count>(std::integer_sequence<int, count...>) {
    (fill.template operator()<count + 1>(), ...);
  }(std::make_integer_sequence<int, MOST_AXES>());
  return found;
}

// Which boxes hold points that may be nearer to the center than their nearest.
template <bool manhattan, int axes>
int64_t near_boxes(const Boxes& boxes, const double* center, int32_t* found) {
  int64_t count = 0;
  for (int64_t i = 0; i < boxes.count; i += 8) {
    Eight gap[axes];
#pragma GCC unroll 8
    for (int c = 0; c < axes; ++c) {
      const Eight at = broadcast<Eight>(center[c]);
      const Eight low = eight(boxes.low[c].data() + i) - at, high = at - eight(boxes.high[c].data() + i);
      const Eight most = low > high ? low : high;
      gap[c] = most > 0 ? most : Eight{};
    }
    count = which(value_of_axes<manhattan, axes>(gap) < eight(boxes.most.data() + i), i, found, count);
  }
  return count;
}

// Which boxes hold the largest value.
inline int64_t farthest_boxes(const Boxes& boxes, int32_t* found) {
  Eight most = broadcast<Eight>(-1);
  for (int64_t i = 0; i < boxes.count; i += 8) {
    const Eight other = eight(boxes.most.data() + i);
    most = other > most ? other : most;
  }
  most = broadcast<Eight>(largest<double, 8>(most));
  int64_t count = 0;
  for (int64_t i = 0; i < boxes.count; i += 8) count = which(eight(boxes.most.data() + i) == most, i, found, count);
  return count;
}

// A further center for the points of box `box`; their largest value afterwards.
template <class Real, bool manhattan, int axes>
double meet_box(const Boxes& boxes, const Real* coordinates, int64_t box, const double* center, int32_t number,
                double* value, int32_t* label) {
  using Labels = VectorOf<int32_t, 32>::type;
  Eight most = broadcast<Eight>(-1);
  for (int64_t i = boxes.begin[box]; i < boxes.begin[box + 1]; i += 8) {
    Eight gap[axes];
#pragma GCC unroll 8
    for (int c = 0; c < axes; ++c) gap[c] = eight(coordinates + c * boxes.slots + i) - broadcast<Eight>(center[c]);
    const Eight measured = value_of_axes<manhattan, axes>(gap), before = eight(value + i);
    const auto closer = measured < before;
    const Eight after = closer ? measured : before;
    keep(value + i, after);
    const Labels labels = load_bits<Labels>(label + i);
    keep(label + i, __builtin_convertvector(closer, Labels) ? Labels{} + number : labels);
    most = after > most ? after : most;
  }
  return largest<double, 8>(most);
}

template <class T, class Real>
BoxLoops<Real> box_loops(bool manhattan, int axes) {
  BoxLoops<Real> found{};
  const auto fill = [&]<int count>() {
    if (axes != count) return;
    found.read = &read_axes<T, Real>;
    found.farthest = &farthest_boxes;
    found.near = manhattan ? &near_boxes<true, count> : &near_boxes<false, count>;
    found.meet = manhattan ? &meet_box<Real, true, count> : &meet_box<Real, false, count>;
  };
  [&]<int... count>(std::integer_sequence<int, count...>) {
    (fill.template operator()<count + 1>(), ...);
  }(std::make_integer_sequence<int, MOST_AXES>());
  return found;
}
