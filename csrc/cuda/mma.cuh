// Tensor-core instructions of sm_80 and newer; nothing but assembly, so that the emulation in tests/ can take its
// place.
#ifndef PROTOFAST_MMA_CUH
#define PROTOFAST_MMA_CUH

#include <cstdint>

namespace protofast {

// d += a·b for a tile of 16 × 8; row, row + 8 and two columns of it lie in each lane. a and b are 8 words deep: of two
// bfloat16 or half each, or of one TF32.
#define PROTOFAST_MMA(NAME, INSTRUCTION)                                                              \
  __device__ inline void NAME(float& d00, float& d01, float& d10, float& d11, const uint32_t (&a)[4], \
                              const uint32_t (&b)[2]) {                                               \
    asm(INSTRUCTION " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                \
        : "+f"(d00), "+f"(d01), "+f"(d10), "+f"(d11)                                                  \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                          \
  }

PROTOFAST_MMA(mma_bf16, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
PROTOFAST_MMA(mma_f16, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
PROTOFAST_MMA(mma_tf32, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32")
#undef PROTOFAST_MMA

// To the nearest TF32; its bits are those of a float.
__device__ inline uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

}  // namespace protofast

#endif
