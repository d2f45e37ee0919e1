// Channel purity by one thread, with values to the bit as protofast/_ops/channels.py lays them down. Included as
// vector.h is.

// `count` numbers `stride` apart as float64.
template <class T>
INLINE void widen(const T* from, int64_t stride, int64_t count, double* to) {
  int64_t c = 0;
  if (stride == 1)
    for (; c + 8 <= count; c += 8) keep(to + c, eight(from + c));
  for (; c < count; ++c) to[c] = static_cast<double>(from[c * stride]);
}

// Σ a·b over numbers filled up by zeros.
INLINE double dot(const double* a, const double* b, int64_t count) {
  Eight total{};
  for (int64_t c = 0; c < count; c += 8) total += eight(a + c) * eight(b + c);
  return sum<double, 8>(total);
}

// u·f of up to PURITY_RUN pixels in a run, in groups of eight at `from`, `from` + 8, …, of which the last is at `last`.
// The results lie in `lanes` as the groups do; where the last begins there is returned. The map is read once, in order.
template <class T>
INLINE int64_t run_of_pixels(const T* x, int64_t channel, const double* u, int64_t channels, int64_t from, int64_t last,
                             double* lanes) {
  const int64_t whole = (last - from + 7) / 8 * 8, width = whole + 8;
  std::fill_n(lanes, 8 * width, 0.0);
  for (int64_t c = 0; c < channels; ++c) {
    const T* const row = x + c * channel;
    double* const lane = lanes + c % 8 * width;
    const Eight by = broadcast<Eight>(u[c]);
    for (int64_t p = 0; p < whole; p += 8) keep(lane + p, eight(lane + p) + by * eight(row + from + p));
    keep(lane + whole, eight(lane + whole) + by * eight(row + last));
  }
  for (int64_t half = 4; half; half /= 2)
    for (int64_t i = 0; i < half * width; i += 8) keep(lanes + i, eight(lanes + i) + eight(lanes + i + half * width));
  return whole;
}

template <class T>
class ChannelRows {
 public:
  explicit ChannelRows(const ChannelPairs& of) : of_(of), u_(padded()), f_(padded()) {}

  const double* row(int64_t pair) {
    widen(static_cast<const T*>(of_.rotation) + of_.chosen[pair] * of_.row, of_.column, of_.channels, u_.data());
    return u_.data();
  }
  const double* pixel(int64_t pair, int64_t p) {
    widen(sample(pair) + of_.x.at(p), of_.x.channel, of_.channels, f_.data());
    return f_.data();
  }
  const T* sample(int64_t pair) const { return static_cast<const T*>(of_.x.data) + pair / of_.pairs * of_.x.sample; }

  // The first pixel of the largest u·f, and that number.
  std::pair<double, int64_t> strongest(int64_t pair) {
    const double* const u = row(pair);
    const T* const x = sample(pair);
    std::pair<double, int64_t> best(0, -1);
    const auto offer = [&](double z, int64_t p) INLINE_LAMBDA {
      if (best.second < 0 || (best.first == best.first && (z > best.first || z != z))) best = {z, p};
    };
    if (of_.x.offset || of_.pixels < 8) {
      for (int64_t p = 0; p < of_.pixels; ++p) offer(dot(u, pixel(pair, p), of_.channels), p);
      return best;
    }
    double* const lanes = aligned(8 * (std::min(of_.pixels, PURITY_RUN) + 8));
    for (int64_t p = 0; p < of_.pixels;) {
      const int64_t from = std::min(p, of_.pixels - 8);  // the last eight may be met before
      const int64_t end = std::min(from + PURITY_RUN, of_.pixels);
      const int64_t last = end - 8;
      const int64_t whole = run_of_pixels(x, of_.x.channel, u, of_.channels, from, last, lanes);
      for (; p < end; ++p) offer(lanes[p < from + whole ? p - from : whole + p - last], p);
    }
    return best;
  }

 private:
  // So many numbers, the first of them where a vector register's worth begins.
  double* aligned(size_t count) {
    lanes_.resize(count + 8);
    return lanes_.data() + (64 - reinterpret_cast<uintptr_t>(lanes_.data()) % 64) % 64 / sizeof(double);
  }
  size_t padded() const { return (of_.channels + 7) / 8 * 8; }

  const ChannelPairs& of_;
  std::vector<double> u_, f_;  // of zeros beyond the channels
  std::vector<double> lanes_;
};

template <class T>
void purity_pairs(const ChannelPurity& args, int64_t begin, int64_t end) {
  using Real = typename Memory<T>::Compute;
  ChannelRows<T> rows(args.of);
  for (int64_t pair = begin; pair < end; ++pair) {
    const auto [z, p] = rows.strongest(pair);
    const double* const f = rows.pixel(pair, p);
    const double length = std::sqrt(dot(f, f, args.of.channels));
    static_cast<Real*>(args.purity)[pair] =
        static_cast<Real>((args.of.rectify && z < 0 ? 0 : z) / std::max(length, PURITY_FLOOR));
    args.index[pair] = p;
  }
}

template <class T>
void purity_factors(const ChannelPurityGradient& args, PurityFactor* factors, int64_t begin, int64_t end) {
  using Real = typename Memory<T>::Compute;
  ChannelRows<T> rows(args.of);
  for (int64_t pair = begin; pair < end; ++pair) {
    if (args.of.rectify && static_cast<const Real*>(args.purity)[pair] <= 0) {
      factors[pair] = {0, 0};
      continue;
    }
    const double* const f = rows.pixel(pair, args.index[pair]);
    const double length = std::sqrt(dot(f, f, args.of.channels)), inverse = 1 / std::max(length, PURITY_FLOOR);
    factors[pair] = {length == 0 ? 0 : static_cast<const Real*>(args.grad)[pair] * inverse, 0};
    if (args.to_x.data && !(length < PURITY_FLOOR))
      factors[pair].pull = dot(rows.row(pair), f, args.of.channels) * inverse * inverse;
  }
}

// Of the features of samples [begin, end): for each pixel that wins, the sum over its pairs, in their order.
template <class T>
void purity_features(const ChannelPurityGradient& args, const PurityFactor* factors, int64_t begin, int64_t end) {
  const ChannelPairs& of = args.of;
  ChannelRows<T> rows(of);
  std::vector<double> total(of.channels);
  std::vector<int64_t> order(of.pairs);
  for (int64_t b = begin; b < end; ++b) {
    const int64_t* const index = args.index + b * of.pairs;
    std::iota(order.begin(), order.end(), int64_t{0});
    std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return index[i] < index[j]; });
    for (auto next = order.begin(); next != order.end();) {
      const int64_t p = index[*next];
      const double* const f = rows.pixel(b * of.pairs, p);
      std::fill(total.begin(), total.end(), 0.0);
      for (; next != order.end() && index[*next] == p; ++next) {
        const int64_t pair = b * of.pairs + *next;
        const PurityFactor factor = factors[pair];
        if (factor.scale == 0) continue;
        const double* const u = rows.row(pair);
        for (int64_t c = 0; c < of.channels; ++c) total[c] += factor.scale * (u[c] - factor.pull * f[c]);
      }
      T* const to = static_cast<T*>(args.to_x.data) + b * args.to_x.sample + args.to_x.at(p);
      for (int64_t c = 0; c < of.channels; ++c) to[c * args.to_x.channel] = static_cast<T>(total[c]);
    }
  }
}

// Of rows of the rotation: `order` holds the pairs by row, in order; `starts` where the pairs of each row begin.
template <class T>
void purity_rotation(const ChannelPurityGradient& args, const PurityFactor* factors, const int64_t* order,
                     const int64_t* starts, int64_t begin, int64_t end) {
  const ChannelPairs& of = args.of;
  ChannelRows<T> rows(of);
  std::vector<double> total(of.channels);
  for (int64_t number = begin; number < end; ++number) {
    std::fill(total.begin(), total.end(), 0.0);
    for (int64_t i = starts[number]; i < starts[number + 1]; ++i) {
      const double scale = factors[order[i]].scale;
      if (scale == 0) continue;
      const double* const f = rows.pixel(order[i], args.index[order[i]]);
      for (int64_t c = 0; c < of.channels; ++c) total[c] += scale * f[c];
    }
    T* const to = static_cast<T*>(args.to_rotation) + of.chosen[order[starts[number]]] * of.channels;
    for (int64_t c = 0; c < of.channels; ++c) to[c] = static_cast<T>(total[c]);
  }
}
