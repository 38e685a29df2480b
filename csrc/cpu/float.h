// The floating-point types that tensors come in.
#pragma once

namespace fastrl {

enum class Float { f32, bf16, f16 };

}  // namespace fastrl
