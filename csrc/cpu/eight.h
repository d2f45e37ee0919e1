// Eight numbers as float64, whatever their type and the instruction set: the lanes of sums that every backend adds up
// in one order. Included as vector.h is.

using Eight = VectorOf<double, 64>::type;
using EightFloats = VectorOf<float, 32>::type;

INLINE Eight eight(const double* from) { return load_bits<Eight>(from); }
INLINE Eight eight(const float* from) { return __builtin_convertvector(load_bits<EightFloats>(from), Eight); }
INLINE Eight eight(const BFloat16* from) {
  using Halves = VectorOf<uint16_t, 16>::type;
  using Words = VectorOf<uint32_t, 32>::type;
  const Words words = __builtin_convertvector(load_bits<Halves>(from), Words) << 16;
  return __builtin_convertvector(bits<EightFloats>(words), Eight);
}
INLINE Eight eight(const Half* from) {
#if VECTOR_BYTES >= 32
  return __builtin_convertvector(bits<EightFloats>(_mm256_cvtph_ps(load_bits<__m128i>(from))), Eight);
#else
  Eight value;
  for (int i = 0; i < 8; ++i) value[i] = static_cast<float>(from[i]);
  return value;
#endif
}

template <class V>
INLINE void keep(void* to, V value) {
  std::memcpy(to, &value, sizeof(V));
}
