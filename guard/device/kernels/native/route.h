// A layer's mask and tap.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace moe_guard {

// topk_weights, topk_ids: the stock router's; masked rows are replaced in their first `top_k` columns
// facts: of all layers, a `Layer` each, see `route.cpp`; bias: [E] or [T, E]
void route(const at::Tensor& router_logits, at::Tensor& topk_weights, at::Tensor& topk_ids,
           const at::Tensor& facts, int64_t layer_index, const std::optional<at::Tensor>& bias);

}  // namespace moe_guard
