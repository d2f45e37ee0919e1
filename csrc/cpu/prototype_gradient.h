// Gradients of the nearest patches, by one thread. Included as vector.h is.
//
// An item is a run of channels and a group of samples: both gradients of these channels need nothing of the others, so
// each number is summed by one thread, in the order of samples, prototypes and ranks.

constexpr int CHANNELS = 4;  // vectors in a run

// What a winner's gradients are made of: factor·(x − p), or factor·p and factor·x; of cosine, with x̂ = x·of_x and
// p̂ = p·of_p, of_x·factor·(cos·x̂ − p̂) and of_p·factor·(cos·p̂ − x̂).
template <class Real>
struct WinnerFactor {
  Real factor;
  Real cos, of_x, of_p;
};

template <class T>
class PrototypeGradients {
 public:
  using Real = typename Memory<T>::Compute;
  using V = Vector<Real>;
  static constexpr int L = LANES<Real>, RUN = CHANNELS * L;

  PrototypeGradients(const PrototypeGradient& args, const GradientPlan& plan) : args_(args), plan_(plan) {
    const PrototypeShape& shape = args.shape;
    FeatureMap dense{};  // a map of one channel without gaps
    int64_t stride = 1;
    for (int axis = AXES - 1; axis >= 0; stride *= shape.size[axis--]) {
      dense.stride[axis] = stride;
      grid_[axis] = shape.grid(axis);
    }
    PrototypeShape one = shape;
    one.channels = 1;
    dense_ = dense;
    pixel_ = patch_offsets(one, dense), x_ = patch_offsets(one, args.x), to_ = patch_offsets(one, args.to_x);
    slot_of_.assign(shape.pixels(), -1);
  }

  // Channels [first, first + RUN) of the samples.
  void run(int64_t group, int64_t first) {
    const PrototypeShape& shape = args_.shape;
    const Range samples = Range{0, shape.samples}.split(group, plan_.groups);
    vectors_ = static_cast<int>(std::min<int64_t>(CHANNELS, (plan_.padded - first) / L));
    channels_ = static_cast<int>(std::min<int64_t>(RUN, shape.channels - first));
    first_ = first;
    sums_ = static_cast<Real*>(plan_.to_p) + group * shape.prototypes * plan_.window * plan_.padded + first;
    if (args_.to_p)
      for (int64_t i = 0; i < shape.prototypes * plan_.window; ++i)
        std::fill_n(sums_ + i * plan_.padded, vectors_ * L, Real{0});
    for (int64_t b = samples.first; b < samples.last; ++b) {
      list(b);
      gather(b);
      if (args_.metric == DOT)
        add(b, [](V x, V p, const WinnerFactor<Real>& f, V& to_x, V& to_p)
                   INLINE_LAMBDA { to_x = p * -f.factor, to_p = x * -f.factor; });
      else if (args_.metric == COSINE)
        add(b, [](V x, V p, const WinnerFactor<Real>& f, V& to_x, V& to_p) INLINE_LAMBDA {
          const V unit_x = x * f.of_x, unit_p = p * f.of_p;
          to_x = (unit_x * f.cos - unit_p) * f.factor * f.of_x, to_p = (unit_p * f.cos - unit_x) * f.factor * f.of_p;
        });
      else
        add(b, [](V x, V p, const WinnerFactor<Real>& f, V& to_x, V& to_p)
                   INLINE_LAMBDA { to_x = (x - p) * f.factor, to_p = -to_x; });
      if (args_.to_x.data) scatter(b);
    }
  }

 private:
  struct Pixel {
    int64_t dense, x, to;
  };

  // The pixels of the sample's winners, each once, and for each winner where its pixels are in that list.
  void list(int64_t b) {
    const PrototypeShape& shape = args_.shape;
    for (const Pixel& pixel : pixels_) slot_of_[pixel.dense] = -1;
    pixels_.clear(), slots_.clear();
    const int64_t winners = shape.prototypes * shape.topk;
    for (int64_t w = 0; w < winners; ++w) {
      const int64_t n = args_.index[b * winners + w];
      if (n < 0) continue;
      const int64_t dense = place(grid_, dense_, n), x = place(grid_, args_.x, n), to = place(grid_, args_.to_x, n);
      for (int64_t k = 0; k < plan_.window; ++k) {
        int32_t& slot = slot_of_[dense + pixel_[k]];
        if (slot < 0) {
          slot = static_cast<int32_t>(pixels_.size());
          pixels_.push_back({dense + pixel_[k], x + x_[k], to + to_[k]});
        }
        slots_.push_back(slot);
      }
    }
  }

  // The channels of the listed pixels, by rows.
  void gather(int64_t b) {
    const int64_t count = static_cast<int64_t>(pixels_.size());
    rows_ = row_buffer_.get(count * RUN);
    to_rows_ = args_.to_x.data ? to_row_buffer_.get(count * RUN) : nullptr;
    if (to_rows_) std::fill_n(to_rows_, count * RUN, Real{0});
    const T* const from = static_cast<const T*>(args_.x.data) + b * args_.x.sample + first_ * args_.x.channel;
    if (args_.x.channel == 1) {
      for (int64_t i = 0; i < count; ++i)
        each_vector(from + pixels_[i].x, channels_,
                    [&](int64_t c, V value) { store_bits(rows_ + i * RUN + c, value, false); });
      return;
    }
    for (int c = 0; c < vectors_ * L; ++c)
      for (int64_t i = 0; i < count; ++i)
        rows_[i * RUN + c] = c < channels_ ? static_cast<Real>(from[c * args_.x.channel + pixels_[i].x]) : Real{0};
  }

  template <class Rule>
  INLINE void add(int64_t b, const Rule& rule) {
    const PrototypeShape& shape = args_.shape;
    const Real* const prototypes = static_cast<const Real*>(plan_.p) + first_;
    const auto* const factors = static_cast<const WinnerFactor<Real>*>(plan_.factors);
    const int32_t* slot = slots_.data();
    for (int64_t p = 0; p < shape.prototypes; ++p)
      for (int64_t j = 0; j < shape.topk; ++j) {
        const int64_t w = (b * shape.prototypes + p) * shape.topk + j;
        if (args_.index[w] < 0) continue;
        const WinnerFactor<Real> factor = factors[w];
        for (int64_t k = 0; k < plan_.window; ++k, ++slot) {
          const Real* const x = rows_ + *slot * int64_t{RUN};
          Real* const to_x = to_rows_ + *slot * int64_t{RUN};
          const int64_t at = (p * plan_.window + k) * plan_.padded;
          for (int v = 0; v < vectors_; ++v) {
            V x_part, p_part;
            rule(load_bits<V>(x + v * L), load_bits<V>(prototypes + at + v * L), factor, x_part, p_part);
            if (to_rows_) store_bits(to_x + v * L, load_bits<V>(to_x + v * L) + x_part, false);
            if (args_.to_p) store_bits(sums_ + at + v * L, load_bits<V>(sums_ + at + v * L) + p_part, false);
          }
        }
      }
  }

  // The gradient of these channels of the sample: zero but at the listed pixels.
  void scatter(int64_t b) {
    const PrototypeShape& shape = args_.shape;
    const FeatureMap& map = args_.to_x;
    T* const to = static_cast<T*>(map.data) + b * map.sample + first_ * map.channel;
    const int64_t pixels = shape.pixels(), count = static_cast<int64_t>(pixels_.size());
    const bool packed = map.channel == pixels && place(shape.size, map, pixels - 1) == pixels - 1;
    if (packed)
      std::memset(static_cast<void*>(to), 0, channels_ * pixels * sizeof(T));
    else
      for (int64_t n = 0; n < pixels; ++n) {
        T* const at = to + place(shape.size, map, n);
        for (int c = 0; c < channels_; ++c) at[c * map.channel] = T(0);
      }
    for (int c = 0; c < channels_; ++c)
      for (int64_t i = 0; i < count; ++i) to[c * map.channel + pixels_[i].to] = static_cast<T>(to_rows_[i * RUN + c]);
  }

  const PrototypeGradient& args_;
  const GradientPlan& plan_;
  FeatureMap dense_;
  int64_t grid_[AXES], first_;
  int vectors_, channels_;
  std::vector<int64_t> pixel_, x_, to_;
  std::vector<int32_t> slot_of_, slots_;
  std::vector<Pixel> pixels_;
  Buffer<Real> row_buffer_, to_row_buffer_;
  Real *rows_, *to_rows_, *sums_;
};

template <class T>
void gradient_items(const PrototypeGradient& args, const GradientPlan& plan, int64_t begin, int64_t end) {
  // The runs of a group after each other: threads that write into the same rows hinder one another.
  constexpr int64_t RUN = PrototypeGradients<T>::RUN;
  const int64_t runs = (plan.padded + RUN - 1) / RUN;
  PrototypeGradients<T> gradients(args, plan);
  for (int64_t i = begin; i < end; ++i) gradients.run(i / runs, i % runs * RUN);
}

// Prototypes [begin, end) as Real, (prototype, pixel of the window, channel) with the channels filled up by zeros.
template <class T>
void unpack_prototypes(const PrototypeGradient& args, const GradientPlan& plan, int64_t begin, int64_t end) {
  using Real = typename Memory<T>::Compute;
  const int64_t channels = args.shape.channels;
  Real* to = static_cast<Real*>(const_cast<void*>(plan.p)) + begin * plan.window * plan.padded;
  const T* from = static_cast<const T*>(args.p) + begin * channels * plan.window;
  for (int64_t p = begin; p < end; ++p, from += channels * plan.window)
    for (int64_t k = 0; k < plan.window; ++k)
      for (int64_t c = 0; c < plan.padded; ++c)
        *to++ = c < channels ? static_cast<Real>(from[c * plan.window + k]) : Real{0};
}

// The sums of the groups, in their order, to prototypes [begin, end).
template <class T>
void pack_gradient(const PrototypeGradient& args, const GradientPlan& plan, int64_t begin, int64_t end) {
  using Real = typename Memory<T>::Compute;
  const int64_t channels = args.shape.channels, group = args.shape.prototypes * plan.window * plan.padded;
  T* to = static_cast<T*>(args.to_p) + begin * channels * plan.window;
  const Real* from = static_cast<const Real*>(plan.to_p) + begin * plan.window * plan.padded;
  for (int64_t p = begin; p < end; ++p, from += plan.window * plan.padded)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t k = 0; k < plan.window; ++k) {
        Real total = 0;
        for (int64_t g = 0; g < plan.groups; ++g) total += from[g * group + k * plan.padded + c];
        *to++ = static_cast<T>(total);
      }
}

// The factors of the winners of samples [begin, end).
template <class T>
void winner_factors(const PrototypeGradient& args, const GradientPlan& plan, int64_t begin, int64_t end) {
  using Real = typename Memory<T>::Compute;
  const PrototypeShape& shape = args.shape;
  const auto read = [](const void* from, int64_t i) { return from ? double{static_cast<const Real*>(from)[i]} : 0.0; };
  auto* const factors = static_cast<WinnerFactor<Real>*>(plan.factors);
  std::vector<int64_t> offset;
  int64_t grid[AXES];
  for (int axis = 0; axis < AXES; ++axis) grid[axis] = shape.grid(axis);
  if (args.metric == COSINE) offset = patch_offsets(shape, args.x);
  for (int64_t i = begin * shape.prototypes * shape.topk; i < end * shape.prototypes * shape.topk; ++i) {
    if (args.index[i] < 0) continue;
    const double d = read(args.distance, i);
    double slope = 0;
    switch (args.activation) {
      case LOG:
        slope = (args.eps - 1) / ((d + 1) * (d + args.eps));
        break;
      case LINEAR:
        slope = -1;
        break;
      case EXP:
        slope = -std::exp(-d);
        break;
      case RECIPROCAL:
        slope = -1 / ((d + 1) * (d + 1));
        break;
      default:
        break;
    }
    double grad = read(args.grad_distance, i);
    if (args.grad_activation && args.activation != NONE) grad += read(args.grad_activation, i) * slope;
    WinnerFactor<Real>& to = factors[i];
    if (args.metric == COSINE) {
      const int64_t p = i / shape.topk % shape.prototypes, b = i / shape.topk / shape.prototypes;
      const T* const x = static_cast<const T*>(args.x.data) + b * args.x.sample + place(grid, args.x, args.index[i]);
      const T* const prototype = static_cast<const T*>(args.p) + p * static_cast<int64_t>(offset.size());
      double xx = 0, pp = 0;
      for (size_t e = 0; e < offset.size(); ++e) {
        const double of_x = static_cast<double>(x[offset[e]]), of_p = static_cast<double>(prototype[e]);
        xx += of_x * of_x, pp += of_p * of_p;
      }
      const double inverse_x = xx == 0 ? 0 : 1 / std::sqrt(xx), inverse_p = pp == 0 ? 0 : 1 / std::sqrt(pp);
      to = {static_cast<Real>(grad), static_cast<Real>(1 - d), static_cast<Real>(inverse_x),
            static_cast<Real>(inverse_p)};
    } else {
      to.factor = static_cast<Real>(args.metric == SQEUCLIDEAN ? 2 * grad
                                    : args.metric == DOT       ? grad
                                                               : (d == 0 ? 0 : grad / d));
    }
  }
}
