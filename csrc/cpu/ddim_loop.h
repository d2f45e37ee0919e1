// The DDIM step over one run of elements that share their coefficients. Included as vector.h is.

constexpr int UNROLL = 4;

template <class S, class M>
struct DdimLoop {
  using Sample = Memory<S>;
  using C = typename Sample::Compute;
  using V = Vector<C>;
  static constexpr int WIDTH = Sample::WIDTH;
  static constexpr int64_t BLOCK = UNROLL * WIDTH;

  const DdimArgs& args;
  const DdimCoefficients<C> k;
  const uint64_t seed, offset;  // of this entry

  static INLINE V clamp(V value, V low, V high) {
    value = value < low ? low : value;  // comparisons with NaN are false: it stays
    return value > high ? high : value;
  }

  static INLINE V draw(const float* from) {
    return __builtin_convertvector(load_bits<typename VectorOf<float, 4 * WIDTH>::type>(from), V);
  }

  // A tensor's `u`-th vector from `from` on.
  template <class T>
  static INLINE V get(const T* from, int u) {
    return Memory<T>::load(from + u * WIDTH);
  }

  // The four vectors of a block. Their elements keep their order where two dtypes meet.
  template <class T>
  static INLINE void get_all(const T* from, V (&to)[UNROLL]) {
    for (int u = 0; u < UNROLL; u += 2)
      if constexpr (std::is_same_v<S, M>)
        Memory<T>::load(from + u * WIDTH, to[u], to[u + 1]);
      else
        to[u] = get(from, u), to[u + 1] = get(from, u + 1);
  }
  static INLINE void put_all(S* to, const V (&from)[UNROLL], bool stream) {
    for (int u = 0; u < UNROLL; u += 2)
      if constexpr (std::is_same_v<S, M>)
        Sample::store(to + u * WIDTH, from[u], from[u + 1], stream);
      else
        for (int v : {u, u + 1}) Sample::store(to + v * WIDTH, from[v], stream);
  }

  // The common step. Loads everything before it stores anything: an output may be an input.
  INLINE void fast(DdimRun<S, M> at, bool stream) const {
    V x[UNROLL], m[UNROLL], more[UNROLL], prev[UNROLL];
    get_all(at.sample, x);
    get_all(at.output, m);
    if (at.cond) {
      get_all(at.cond, more);
      const V scale = splat<V>(static_cast<C>(args.guidance));
      for (int u = 0; u < UNROLL; ++u) m[u] = fma(scale, more[u] - m[u], m[u]);
    }
    for (int u = 0; u < UNROLL; ++u) prev[u] = fma(splat<V>(k.sample), x[u], splat<V>(k.output) * m[u]);
    if (at.noise) {
      get_all(at.noise, more);
      for (int u = 0; u < UNROLL; ++u) prev[u] = fma(splat<V>(k.column[SIGMA]), more[u], prev[u]);
    }
    if (args.clips || at.x0) {
      for (int u = 0; u < UNROLL; ++u) {
        V x0 = args.prediction == SAMPLE ? m[u] : fma(splat<V>(k.a), x[u], splat<V>(k.b) * m[u]);
        if (args.clips) {
          x0 = clamp(x0, splat<V>(static_cast<C>(args.low)), splat<V>(static_cast<C>(args.high)));
          prev[u] = fma(splat<V>(k.clipped), x0, prev[u]);
        }
        more[u] = x0;
      }
      if (at.x0) put_all(at.x0, more, stream);
    }
    put_all(at.prev, prev, stream);
  }

  // The step with all its options; without contraction if `bitwise`.
  template <bool bitwise>
  INLINE void full(DdimRun<S, M> at, bool stream) const {
    const auto mul_add = [](V a, V b, V c) {
      if constexpr (bitwise)
        return a * b + c;
      else
        return fma(a, b, c);
    };
    const auto column = [&](Column which) { return splat<V>(k.column[which]); };
    float drawn[BLOCK];
    if (args.seed) Philox<WIDTH>::normal(seed, offset, at.element / 4, drawn);
    V all_prev[UNROLL], all_x0[UNROLL];
    for (int u = 0; u < UNROLL; ++u) {
      const V x = get(at.sample, u);
      V m = get(at.output, u), x0, e{}, prev;
      if (at.cond) m = mul_add(splat<V>(static_cast<C>(args.guidance)), get(at.cond, u) - m, m);
      if (args.rescale) m = m * k.rescale;
      if (args.prediction == SAMPLE)
        x0 = m;
      else if (!bitwise)
        x0 = fma(splat<V>(k.a), x, splat<V>(k.b) * m);
      else if (args.prediction == EPSILON)
        x0 = (x - column(SPREAD) * m) / column(SIGNAL);
      else
        x0 = column(SIGNAL) * x - column(SPREAD) * m;
      if (bitwise) {
        if (args.prediction == EPSILON)
          e = m;
        else if (args.prediction == SAMPLE)
          e = (x - column(SIGNAL) * m) / column(SPREAD);
        else
          e = column(SIGNAL) * m + column(SPREAD) * x;
      }
      if (args.threshold) {
        const V s = splat<V>(k.threshold);
        x0 = clamp(x0, -s, s) / s;
      } else if (args.clips) {
        x0 = clamp(x0, splat<V>(static_cast<C>(args.low)), splat<V>(static_cast<C>(args.high)));
      }
      if constexpr (bitwise) {
        if (args.clipped_direction) e = (x - column(SIGNAL) * x0) / column(SPREAD);
        prev = column(PREV_SIGNAL) * x0 + column(DIRECTION) * e;
      } else {
        prev = fma(splat<V>(k.sample), x, splat<V>(k.output) * m);
      }
      if (args.seed) {
        S rounded[WIDTH];  // as a given one is
        Sample::store(rounded, draw(drawn + u * WIDTH), false);
        prev = mul_add(column(SIGMA), get(rounded, 0), prev);
      } else if (at.noise) {
        prev = mul_add(column(SIGMA), get(at.noise, u), prev);
      }
      if (!bitwise && args.clips) prev = fma(splat<V>(k.clipped), x0, prev);  // after the noise, as in `fast`
      if (at.known) {
        V kept = get(at.known, u);
        if (at.known_noise) kept = mul_add(column(PREV_SIGNAL), kept, column(PREV_SPREAD) * get(at.known_noise, u));
        using Lanes = decltype(x < x);
        const auto free = load_bits<typename VectorOf<int8_t, WIDTH>::type>(at.mask + u * WIDTH);
        prev = __builtin_convertvector(free, Lanes) != 0 ? prev : kept;
      }
      all_prev[u] = prev;
      all_x0[u] = x0;
    }
    for (int u = 0; u < UNROLL; ++u) {
      if (at.x0) Sample::store(at.x0 + u * WIDTH, all_x0[u], stream);
      Sample::store(at.prev + u * WIDTH, all_prev[u], stream);
    }
  }

  INLINE void block(DdimRun<S, M> at, bool stream) const {
    if (args.bitwise)
      full<true>(at, stream);
    else if (args.rescale || args.threshold || args.seed || at.known)
      full<false>(at, stream);
    else
      fast(at, stream);
  }

  // Fewer elements than a block, by way of a padded one: every element sees the same arithmetic.
  __attribute__((noinline)) void part(DdimRun<S, M> at, int64_t count) const {
    S memory[6][BLOCK] = {};
    M outputs[2][BLOCK] = {};
    uint8_t mask[BLOCK] = {};
    DdimRun<S, M> padded{};
    int used = 0;
    const auto copy = [&](const S* from, const S*& to) {
      if (!from) return;
      to = memory[used];
      std::memcpy(memory[used++], from, count * sizeof(S));
    };
    copy(at.sample, padded.sample);
    copy(at.noise, padded.noise);
    copy(at.known, padded.known);
    copy(at.known_noise, padded.known_noise);
    std::memcpy(outputs[0], at.output, count * sizeof(M));
    padded.output = outputs[0];
    if (at.cond) {
      std::memcpy(outputs[1], at.cond, count * sizeof(M));
      padded.cond = outputs[1];
    }
    if (at.mask) {
      std::memcpy(mask, at.mask, count);
      padded.mask = mask;
    }
    padded.element = at.element;
    padded.prev = memory[4];
    padded.x0 = at.x0 ? memory[5] : nullptr;
    block(padded, false);
    if (at.x0) std::memcpy(at.x0, memory[5], count * sizeof(S));
    std::memcpy(at.prev, memory[4], count * sizeof(S));
  }

  void run(DdimRun<S, M> at, int64_t count, bool stream) const {
    if (stream) {  // such stores must be aligned
      const auto misaligned = [](const S* p) { return -reinterpret_cast<uintptr_t>(p) % VECTOR_BYTES; };
      const int64_t head = args.seed ? 0 : std::min<int64_t>(count, misaligned(at.prev) / sizeof(S));
      if (head > 0) part(at, head);
      at.advance(head);
      count -= head;
      stream = misaligned(at.prev) == 0 && misaligned(at.x0) == 0;
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

template <class S, class M>
void ddim_run(const DdimArgs& args, int64_t entry, DdimRun<S, M> at, int64_t count, bool stream) {
  using C = typename Memory<S>::Compute;
  const uint64_t seed = args.seed ? args.seed[0] : 0, offset = args.seed ? args.seed[1] + uint64_t(entry) : 0;
  const DdimLoop<S, M> loop{args, combine<C>(args, entry), seed, offset};
  loop.run(at, count, stream);
}

// `count` numbers of one sample, from the element `first`, a multiple of 4, on.
template <class T>
void normal_run(uint64_t seed, uint64_t offset, int64_t first, T* out, int64_t count) {
  using Loop = DdimLoop<T, T>;
  float drawn[Loop::BLOCK];
  T last[Loop::BLOCK];
  for (; count > 0; count -= Loop::BLOCK, first += Loop::BLOCK, out += Loop::BLOCK) {
    Philox<Loop::WIDTH>::normal(seed, offset, first / 4, drawn);
    T* const to = count < Loop::BLOCK ? last : out;
    for (int u = 0; u < UNROLL; ++u) Memory<T>::store(to + u * Loop::WIDTH, Loop::draw(drawn + u * Loop::WIDTH), false);
    if (to == last) std::memcpy(out, last, count * sizeof(T));
  }
}
