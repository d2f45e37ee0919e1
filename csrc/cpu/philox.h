// Philox4x32-10 (Salmon et al. 2011) and Box–Muller, LANES blocks at once: the operations of
// backends/reference/philox.py in their order, so the same bits. Included as vector.h is.

template <int LANES>
struct Philox {
  using Word = VectorOf<uint32_t, 4 * LANES>::type;
  using Signed = VectorOf<int32_t, 4 * LANES>::type;
  using Float = VectorOf<float, 4 * LANES>::type;

  static INLINE void box_muller(Word radius, Word angle, Float& first, Float& second) {
    const Float u = __builtin_convertvector(radius, Float) * 0x1p-32f + 0x1p-33f;
    const Word as_bits = bits<Word>(u);
    Float g = bits<Float>((as_bits & 0x7fffff) | 0x3f800000);
    const Signed large = g > 1.41421356f;
    const Float exponent = __builtin_convertvector(bits<Signed>(as_bits >> 23) - 127 - large, Float);
    g = (large ? g * 0.5f : g) - 1.0f;
    const Float square = g * g;
    Float tail = splat<Float>(-0.07634499669075012f);
    for (float c : {0.1276157796382904f, -0.13160182535648346f, 0.14201757311820984f, -0.16623356938362122f,
                    0.20001226663589478f, -0.2500081956386566f, 0.3333333134651184f})
      tail = tail * g + c;
    tail = (tail * g) * square + exponent * -2.12194440e-4f - square * 0.5f;
    const Float r = square_root((g + tail + exponent * 0.693359375f) * -2.0f);

    const Word quadrant = angle >> 30;
    const Float phi = __builtin_convertvector(bits<Signed>(angle << 2), Float) * 3.65729529994141e-10f;
    const Float y = phi * phi;
    const Float sine =
        ((-0.0001951729936990887f * y + 0.008332177996635437f) * y - 0.16666655242443085f) * y * phi + phi;
    const Float cosine =
        ((2.4438451873720624e-05f * y - 0.001388736767694354f) * y + 0.04166664555668831f) * y * y - y * 0.5f + 1.0f;
    const auto swap = (quadrant & 1) != 0;
    const Word cos = bits<Word>(swap ? sine : cosine), sin = bits<Word>(swap ? cosine : sine);
    first = r * bits<Float>(cos ^ (((quadrant + 1) & 2) << 30));
    second = r * bits<Float>(sin ^ ((quadrant & 2) << 30));
  }

  // The 4·LANES numbers from element 4·block on, in order, of the sample that `offset` numbers.
  static INLINE void normal(uint64_t seed, uint64_t offset, uint64_t block, float* out) {
    Word lane;
    for (int i = 0; i < LANES; ++i) lane[i] = i;
    const uint32_t low = static_cast<uint32_t>(block);
    Word c0 = lane + low;
    Word c1 = splat<Word>(static_cast<uint32_t>(block >> 32)) - bits<Word>(c0 < low);  // the carry
    Word c2 = splat<Word>(static_cast<uint32_t>(offset)), c3 = splat<Word>(static_cast<uint32_t>(offset >> 32));
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9, k1 += 0xBB67AE85) {
      const Word high0 = multiply_high(c0, 0xD2511F53), low0 = c0 * 0xD2511F53;
      const Word high1 = multiply_high(c2, 0xCD9E8D57), low1 = c2 * 0xCD9E8D57;
      c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
    }
    Float z0, z1, z2, z3;
    box_muller(c0, c1, z0, z1);
    box_muller(c2, c3, z2, z3);
    constexpr auto lanes = std::make_index_sequence<LANES>();
    const Float even[2] = {zip<0>(z0, z2, lanes), zip<1>(z0, z2, lanes)};
    const Float odd[2] = {zip<0>(z1, z3, lanes), zip<1>(z1, z3, lanes)};
    for (int i = 0; i < 2; ++i) {
      store_bits(out + 2 * i * LANES, zip<0>(even[i], odd[i], lanes), false);
      store_bits(out + (2 * i + 1) * LANES, zip<1>(even[i], odd[i], lanes), false);
    }
  }
};
