#include "prototype_screen.cuh"

namespace protofast {

const char* screen_tf32(const Screen& screen, Dtype dtype, Arithmetic arithmetic, void* stream) {
  if (dtype != Dtype::f32) return "TF32 is for float32";
  return arithmetic == Arithmetic::TF32 ? launch_screen<float, Mma<Arithmetic::TF32>>(screen, stream)
                                        : launch_screen<float, Mma<Arithmetic::TF32X3>>(screen, stream);
}

}  // namespace protofast
