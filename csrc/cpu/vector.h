// Vectors of VECTOR_BYTES bytes: load, store and non-temporal store, with conversion to the type of the arithmetic.
// No include guard: a kernel includes this once for each instruction set, inside that set's namespace and target.

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

template <class T, int bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(bytes)));
};

template <class T>
using Vector = typename VectorOf<T, VECTOR_BYTES>::type;

template <class To, class From>
INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class V>
INLINE V load_bits(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

template <class V>
INLINE void store_bits(void* to, V value, bool stream) {
#ifdef __x86_64__
  if (stream) {
    if constexpr (sizeof(V) == 64) return _mm512_stream_si512(static_cast<__m512i*>(to), bits<__m512i>(value));
    if constexpr (sizeof(V) == 32) return _mm256_stream_si256(static_cast<__m256i*>(to), bits<__m256i>(value));
    if constexpr (sizeof(V) == 16) return _mm_stream_si128(static_cast<__m128i*>(to), bits<__m128i>(value));
    if constexpr (sizeof(V) == 8) return _mm_stream_si64(static_cast<long long*>(to), bits<long long>(value));
  }
#endif
  std::memcpy(to, &value, sizeof(V));
}

// a·b + c, rounded once where the instruction set can.
template <class V>
INLINE V fma(V a, V b, V c) {
  using T [[maybe_unused]] = std::remove_reference_t<decltype(a[0])>;
#if VECTOR_BYTES == 64
  if constexpr (std::is_same_v<T, float>)
    return bits<V>(_mm512_fmadd_ps(bits<__m512>(a), bits<__m512>(b), bits<__m512>(c)));
  if constexpr (std::is_same_v<T, double>)
    return bits<V>(_mm512_fmadd_pd(bits<__m512d>(a), bits<__m512d>(b), bits<__m512d>(c)));
#elif VECTOR_BYTES == 32
  if constexpr (std::is_same_v<T, float>)
    return bits<V>(_mm256_fmadd_ps(bits<__m256>(a), bits<__m256>(b), bits<__m256>(c)));
  if constexpr (std::is_same_v<T, double>)
    return bits<V>(_mm256_fmadd_pd(bits<__m256d>(a), bits<__m256d>(b), bits<__m256d>(c)));
#endif
  return a * b + c;
}

// All lanes the same; negative zero becomes zero.
template <class V, class T>
INLINE V splat(T value) {
  return V{} + value;
}

// All lanes the same, to the bit.
template <class V, class T, size_t... I>
INLINE V broadcast(T value, std::index_sequence<I...>) {
  return V{(static_cast<void>(I), value)...};
}

template <class V, class T = std::remove_reference_t<decltype(V{}[0])>>
INLINE V broadcast(std::type_identity_t<T> value) {
  return broadcast<V, T>(value, std::make_index_sequence<sizeof(V) / sizeof(T)>());
}

// Lanes of a and b in turn: of their lower halves, or of their upper.
template <int half, class V, size_t... I>
INLINE V zip(V a, V b, std::index_sequence<I...>) {
  constexpr size_t L = sizeof...(I);
#ifdef __clang__
  return __builtin_shufflevector(a, b, (I % 2 * L + half * L / 2 + I / 2)...);
#else
  using Lane = std::conditional_t<sizeof(V) / L == 8, int64_t, int32_t>;
  return __builtin_shuffle(a, b, typename VectorOf<Lane, sizeof(V)>::type{(I % 2 * L + half * L / 2 + I / 2)...});
#endif
}

// The high words of products of 32-bit words.
template <class Word>
INLINE Word multiply_high(Word a, uint32_t by) {
#if VECTOR_BYTES == 64
  if constexpr (sizeof(Word) == 64) {
    const __m512i x = bits<__m512i>(a), factor = _mm512_set1_epi32(by);
    const __m512i even = _mm512_mul_epu32(x, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), factor);
    return bits<Word>(_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd));
  }
#endif
#if VECTOR_BYTES >= 32
  if constexpr (sizeof(Word) == 32) {
    const __m256i x = bits<__m256i>(a), factor = _mm256_set1_epi32(by);
    const __m256i even = _mm256_mul_epu32(x, factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), factor);
    return bits<Word>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa));
  }
#endif
  using Long = typename VectorOf<uint64_t, 2 * sizeof(Word)>::type;
  return __builtin_convertvector((__builtin_convertvector(a, Long) * by) >> 32, Word);
}

template <class V>
INLINE V square_root(V value) {
#if VECTOR_BYTES == 64
  if constexpr (sizeof(V) == 64) return bits<V>(_mm512_sqrt_ps(bits<__m512>(value)));
#endif
#if VECTOR_BYTES >= 32
  if constexpr (sizeof(V) == 32) return bits<V>(_mm256_sqrt_ps(bits<__m256>(value)));
#endif
  V root{};
  for (size_t i = 0; i < sizeof(V) / sizeof(float); ++i) root[i] = std::sqrt(value[i]);
  return root;
}

// How a storage type T is loaded into, and stored from, vectors of Compute. The forms for two vectors may give the
// elements another order within the two, the same for all tensors of T.
template <class T>
struct Memory {
  using Compute = T;
  static constexpr int WIDTH = VECTOR_BYTES / sizeof(T);
  static INLINE Vector<T> load(const T* from) { return load_bits<Vector<T>>(from); }
  static INLINE void store(T* to, Vector<T> value, bool stream) { store_bits(to, value, stream); }
  static INLINE void load(const T* from, Vector<T>& a, Vector<T>& b) { a = load(from), b = load(from + WIDTH); }
  static INLINE void store(T* to, Vector<T> a, Vector<T> b, bool stream) {
    store(to, a, stream), store(to + WIDTH, b, stream);
  }
};

template <>
struct Memory<BFloat16> {
  using Compute = float;
  static constexpr int WIDTH = VECTOR_BYTES / 4;
  using Half = VectorOf<uint16_t, VECTOR_BYTES / 2>::type;
  using Word = Vector<uint32_t>;
  static constexpr uint32_t UPPER = 0xffff0000;

  // The result is in the upper half of each word, over bits that do not count. To nearest, ties to even.
  static INLINE Word round(Vector<float> value) {
    const Word word = bits<Word>(value);
    return value == value ? word + 0x7fff + ((word >> 16) & 1) : word | 0x400000;
  }
  static INLINE Vector<float> load(const BFloat16* from) {
    return bits<Vector<float>>(__builtin_convertvector(load_bits<Half>(from), Word) << 16);
  }
  static INLINE void store(BFloat16* to, Vector<float> value, bool stream) {
    store_bits(to, __builtin_convertvector(round(value) >> 16, Half), stream);
  }
  // Even elements, then odd ones: no lane has to move.
  static INLINE void load(const BFloat16* from, Vector<float>& even, Vector<float>& odd) {
    const Word both = load_bits<Word>(from);
    even = bits<Vector<float>>(both << 16), odd = bits<Vector<float>>(both & UPPER);
  }
  static INLINE void store(BFloat16* to, Vector<float> even, Vector<float> odd, bool stream) {
    store_bits(to, (round(even) >> 16) | (round(odd) & UPPER), stream);
  }
};

template <>
struct Memory<Half> {
  using Compute = float;
  static constexpr int WIDTH = VECTOR_BYTES / 4;

#if VECTOR_BYTES == 64
  static INLINE Vector<float> load(const Half* from) {
    return bits<Vector<float>>(_mm512_cvtph_ps(load_bits<__m256i>(from)));
  }
  static INLINE void store(Half* to, Vector<float> value, bool stream) {
    store_bits(to, _mm512_cvtps_ph(bits<__m512>(value), _MM_FROUND_TO_NEAREST_INT), stream);
  }
#elif VECTOR_BYTES == 32
  static INLINE Vector<float> load(const Half* from) {
    return bits<Vector<float>>(_mm256_cvtph_ps(load_bits<__m128i>(from)));
  }
  static INLINE void store(Half* to, Vector<float> value, bool stream) {
    store_bits(to, _mm256_cvtps_ph(bits<__m256>(value), _MM_FROUND_TO_NEAREST_INT), stream);
  }
#else
  static INLINE Vector<float> load(const Half* from) {
    Vector<float> value;
    for (int i = 0; i < WIDTH; ++i) value[i] = static_cast<float>(from[i]);
    return value;
  }
  static INLINE void store(Half* to, Vector<float> value, bool) {
    for (int i = 0; i < WIDTH; ++i) to[i] = static_cast<Half>(value[i]);
  }
#endif
  static INLINE void load(const Half* from, Vector<float>& a, Vector<float>& b) {
    a = load(from), b = load(from + WIDTH);
  }
  static INLINE void store(Half* to, Vector<float> a, Vector<float> b, bool stream) {
    store(to, a, stream), store(to + WIDTH, b, stream);
  }
};
