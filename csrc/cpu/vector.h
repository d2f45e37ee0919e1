// Vectors of VECTOR_BYTES bytes: load, store and non-temporal store, with conversion to the type of the arithmetic.
// No include guard: a kernel includes this once for each instruction set, inside that set's namespace and target.

#define INLINE inline __attribute__((always_inline))

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

// How a storage type T is loaded into, and stored from, vectors of Compute.
template <class T>
struct Memory {
  using Compute = T;
  static constexpr int WIDTH = VECTOR_BYTES / sizeof(T);
  static INLINE Vector<T> load(const T* from) { return load_bits<Vector<T>>(from); }
  static INLINE void store(T* to, Vector<T> value, bool stream) { store_bits(to, value, stream); }
};

template <>
struct Memory<BFloat16> {
  using Compute = float;
  static constexpr int WIDTH = VECTOR_BYTES / 4;
  using Half = VectorOf<uint16_t, VECTOR_BYTES / 2>::type;
  using Word = Vector<uint32_t>;

  static INLINE Vector<float> load(const BFloat16* from) {
    return bits<Vector<float>>(__builtin_convertvector(load_bits<Half>(from), Word) << 16);
  }
  static INLINE void store(BFloat16* to, Vector<float> value, bool stream) {  // to nearest, ties to even
    const Word word = bits<Word>(value);
    const Word rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    const Word quiet = (word >> 16) | 0x40;
    store_bits(to, __builtin_convertvector(value == value ? rounded : quiet, Half), stream);
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
};
