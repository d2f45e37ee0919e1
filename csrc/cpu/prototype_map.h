// Distances at every patch, by one thread. Included as vector.h is.

template <class T>
class PrototypeMapper {
 public:
  using Real = typename Memory<T>::Compute;
  static constexpr int L = LANES<Real>, COUNT = WIDE * L;

  explicit PrototypeMapper(const PrototypeMap& args)
      : args_(args),
        patches_(args.shape, args.x, args.metric, Screen::real, args.metric == COSINE, false),
        panel_(patches_, Screen::real, args.metric == COSINE) {}

  void run(const SearchTask& task) {
    each_segment(task, patches_, nullptr, [&] { flush(task); });
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
    const auto run = args_.metric == DOT ? &tile_of<Products<Real>, Real> : &tile_of<Squares<Real>, Real>;
    run(height, panel_.width, patches_.rows(segment.tile + t), panel_.cells, patches_.chunks, zero, out);
    for (int q = 0; q < panel_.count; ++q) {
      Real* const to = static_cast<Real*>(args_.distance) +
                       (segment.sample * args_.shape.prototypes + p + q) * args_.shape.patches() + patches_.id[slot];
      for (int i = 0; i < height; ++i) {
        const Real value = out[i * panel_.width * L + q];
        if (patches_.odd[slot + i] || panel_.odd[q]) {
          const double exact = direct<double>(args_.metric, patches_, slot + i, panel_, q);
          to[i] = static_cast<Real>(args_.metric == EUCLIDEAN ? std::sqrt(exact) : exact);
          continue;
        }
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
