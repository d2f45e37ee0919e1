// The DDIM step over one run of elements that share their coefficients. Included as vector.h is.

constexpr int UNROLL = 4;

template <class T>
struct DdimLoop {
  using M = Memory<T>;
  using C = typename M::Compute;
  using V = Vector<C>;
  static constexpr int64_t BLOCK = UNROLL * M::WIDTH;

  const DdimCoefficients<C> k;
  const C low, high, guidance;
  const bool clips;

  // Loads everything before it stores anything: an output may be an input.
  INLINE void block(DdimRun<T> at, bool stream) const {
    V x[UNROLL], m[UNROLL], prev[UNROLL];
    for (int u = 0; u < UNROLL; ++u) {
      x[u] = M::load(at.sample + u * M::WIDTH);
      m[u] = M::load(at.output + u * M::WIDTH);
    }
    if (at.cond)
      for (int u = 0; u < UNROLL; ++u) m[u] += guidance * (M::load(at.cond + u * M::WIDTH) - m[u]);
    for (int u = 0; u < UNROLL; ++u) prev[u] = k.sample * x[u] + k.output * m[u];
    if (at.noise)
      for (int u = 0; u < UNROLL; ++u) prev[u] += k.noise * M::load(at.noise + u * M::WIDTH);
    if (clips || at.x0) {
      for (int u = 0; u < UNROLL; ++u) {
        V x0 = k.a * x[u] + k.b * m[u];
        if (clips) {
          const V bottom = V{} + low, top = V{} + high;
          x0 = x0 < bottom ? bottom : x0;  // comparisons with NaN are false: it stays
          x0 = x0 > top ? top : x0;
          prev[u] += k.clipped * x0;
        }
        if (at.x0) M::store(at.x0 + u * M::WIDTH, x0, stream);
      }
    }
    for (int u = 0; u < UNROLL; ++u) M::store(at.prev + u * M::WIDTH, prev[u], stream);
  }

  // Fewer elements than a block, by way of a padded one: every element sees the same arithmetic.
  void part(DdimRun<T> at, int64_t count) const {
    T memory[6][BLOCK] = {};
    const size_t bytes = count * sizeof(T);
    std::memcpy(memory[0], at.sample, bytes);
    std::memcpy(memory[1], at.output, bytes);
    if (at.cond) std::memcpy(memory[2], at.cond, bytes);
    if (at.noise) std::memcpy(memory[3], at.noise, bytes);
    block({memory[0], memory[1], at.cond ? memory[2] : nullptr, at.noise ? memory[3] : nullptr, memory[4],
           at.x0 ? memory[5] : nullptr},
          false);
    if (at.x0) std::memcpy(at.x0, memory[5], bytes);
    std::memcpy(at.prev, memory[4], bytes);
  }

  void run(DdimRun<T> at, int64_t count, bool stream) const {
    if (stream) {  // such stores must be aligned
      const auto address = [](const T* p) { return reinterpret_cast<uintptr_t>(p); };
      const int64_t head = std::min<int64_t>(count, (-address(at.prev) % VECTOR_BYTES) / sizeof(T));
      if (head > 0) part(at, head);
      at.advance(head);
      count -= head;
      stream = address(at.prev) % VECTOR_BYTES == 0 && address(at.x0) % VECTOR_BYTES == 0;
    }
    for (; count >= BLOCK; count -= BLOCK) {
      block(at, stream);
      at.advance(BLOCK);
    }
    if (count > 0) part(at, count);
#ifdef __x86_64__
    if (stream) _mm_sfence();
#endif
  }
};

template <class T>
void ddim_run(const DdimArgs& args, int64_t entry, DdimRun<T> at, int64_t count, bool stream) {
  using C = typename Memory<T>::Compute;
  const DdimLoop<T> loop{ddim_coefficients<C>(args, entry), static_cast<C>(args.low), static_cast<C>(args.high),
                         static_cast<C>(args.guidance), args.clips};
  loop.run(at, count, stream);
}
