// Philox4x32-10 (Salmon et al. 2011) and Box–Muller: the operations of backends/reference/philox.py in their order, so
// the same bits. Compiled without contraction.
#pragma once

#include <cstdint>

namespace protofast {

__device__ inline void box_muller(uint32_t radius, uint32_t angle, float& first, float& second) {
  const float u = static_cast<float>(radius) * 0x1p-32f + 0x1p-33f;
  const int bits = __float_as_int(u);
  float g = __int_as_float((bits & 0x7fffff) | 0x3f800000);
  const bool large = g > 1.41421356f;
  const float exponent = static_cast<float>((bits >> 23) - 127 + large);
  g = (large ? g * 0.5f : g) - 1.0f;
  const float square = g * g;
  float tail = -0.07634499669075012f;
#pragma unroll
  for (float c : {0.1276157796382904f, -0.13160182535648346f, 0.14201757311820984f, -0.16623356938362122f,
                  0.20001226663589478f, -0.2500081956386566f, 0.3333333134651184f})
    tail = tail * g + c;
  tail = (tail * g) * square + exponent * -2.12194440e-4f - square * 0.5f;
  const float r = __fsqrt_rn((g + tail + exponent * 0.693359375f) * -2.0f);

  const uint32_t quadrant = angle >> 30;
  const float phi = static_cast<float>(static_cast<int>(angle << 2)) * 3.65729529994141e-10f;
  const float y = phi * phi;
  const float sine = ((-0.0001951729936990887f * y + 0.008332177996635437f) * y - 0.16666655242443085f) * y * phi + phi;
  const float cosine =
      ((2.4438451873720624e-05f * y - 0.001388736767694354f) * y + 0.04166664555668831f) * y * y - y * 0.5f + 1.0f;
  const float cos = quadrant & 1 ? sine : cosine, sin = quadrant & 1 ? cosine : sine;
  first = r * ((quadrant + 1) & 2 ? -cos : cos);
  second = r * (quadrant & 2 ? -sin : sin);
}

// The four numbers of a block.
__device__ inline void normal_block(uint64_t seed, uint64_t offset, uint64_t block, float (&out)[4]) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32);
  uint32_t c2 = static_cast<uint32_t>(offset), c3 = static_cast<uint32_t>(offset >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9, k1 += 0xBB67AE85) {
    const uint32_t high0 = __umulhi(c0, 0xD2511F53), high1 = __umulhi(c2, 0xCD9E8D57);
    const uint32_t low0 = c0 * 0xD2511F53, low1 = c2 * 0xCD9E8D57;
    c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
  }
  box_muller(c0, c1, out[0], out[1]);
  box_muller(c2, c3, out[2], out[3]);
}

// `width` numbers from `element` on, a multiple of `width`.
template <int width>
__device__ inline void normals(uint64_t seed, uint64_t offset, int64_t element, float (&out)[width]) {
#pragma unroll
  for (int done = 0; done < width; done += 4) {
    float four[4];
    normal_block(seed, offset, (element + done) / 4, four);
    const int skip = width < 4 ? element % 4 : 0;
#pragma unroll
    for (int j = 0; j < (width < 4 ? width : 4); ++j)  // by comparison: an index would put `four` into local memory
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (i == skip + j) out[done + j] = four[i];
  }
}

}  // namespace protofast
