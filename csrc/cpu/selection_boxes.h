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
    const Eight bound = value_of_axes<manhattan, axes>(gap), most = eight(boxes.most.data() + i);
#if VECTOR_BYTES == 64
    const __mmask8 near = _mm512_cmp_pd_mask(bits<__m512d>(bound), bits<__m512d>(most), _CMP_LT_OQ);
    const __m512i numbers = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(i)),
                                             _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 7, 6, 5, 4, 3, 2, 1, 0));
    _mm512_mask_compressstoreu_epi32(found + count, near, numbers);
    count += std::popcount(static_cast<unsigned>(near));
#else
    const auto near = bound < most;
    for (int lane = 0; lane < 8; ++lane)
      if (near[lane]) found[count++] = static_cast<int32_t>(i + lane);
#endif
  }
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
    found.near = manhattan ? &near_boxes<true, count> : &near_boxes<false, count>;
    found.meet = manhattan ? &meet_box<Real, true, count> : &meet_box<Real, false, count>;
  };
  [&]<int... count>(std::integer_sequence<int, count...>) {
    (fill.template operator()<count + 1>(), ...);
  }(std::make_integer_sequence<int, MOST_AXES>());
  return found;
}
