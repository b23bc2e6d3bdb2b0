// Mask and tap of a MoE layer on a CPU, as one operation in vLLM's graph, behind the stock router.
//
// A row that no mask of the layer applies to costs a look at its bits and the copy into the tap. The
// others are routed again from their logits; what that must give is written in
// `guard/device/routing.py`, and the bits in `guard/device/mask.py`.
//
// Letters as in `guard/device/layout.py`.

#include "route.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr float kSoftplusIsExpBelow = -20.0f, kSoftplusIsLinearAbove = 20.0f;
constexpr int64_t kTier = int64_t{1} << 33;  // more than any two floats, read as ordered numbers, lie apart
constexpr int64_t kMasksAtOnce = 16;         // masked rows that are worth another thread

enum Scoring : int64_t { kSoftmax, kSigmoid, kSqrtSoftplus };  // as `SCORINGS` in Python
enum Asked : uint8_t { kNothing, kReroute, kDropRenorm, kDrop, kForce };
constexpr int64_t kNumMethods = 4;  // `MaskMethodCode`, in the order of the latter

// One layer's facts and the buffers that it reads and writes, as `_CpuFacts` in `layer_routing.py` lays
// them out. They come as one tensor of whole numbers for all layers: an operation's every argument costs
// time in a step, and so does each input of a compiled graph, which is looked up anew.
// row_bits_TW: [max_rows, W], null where nothing is masked; the others are the layer's own part
struct Layer {
  const int64_t *row_bits_TW, *expert_bits_EW, *methods_MW;
  int32_t* tap_ids_TK;
  float* tap_weights_TK;
  int64_t num_words, tap_stride, max_rows, top_k, num_experts, scoring, renormalize, num_groups;
  int64_t topk_groups;
  double scaling;
};
static_assert(sizeof(Layer) == 15 * sizeof(int64_t));

struct Scratch {
  std::vector<float> logits_E, choice_E, group_score_G;
  std::vector<int64_t> key_E;
  std::vector<uint8_t> asked_E, in_kept_G;
  std::vector<float> log_weight_K, weight_K, restored_K;
};

float softplus(float z) { return z > kSoftplusIsLinearAbove ? z : std::log1p(std::exp(z)); }

int64_t ordered(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits < 0 ? bits ^ 0x7FFFFFFF : bits;
}

// What masks in force ask of each expert. Returns whether they ask anything.
bool asked_of_experts(const int64_t* row_bits_W, const int64_t* expert_bits_EW, const int64_t* methods_MW,
                      int64_t num_words, int64_t num_experts, uint8_t* asked_E) {
  std::fill_n(asked_E, num_experts, kNothing);
  bool any = false;
  for (int64_t word = 0; word < num_words; ++word) {
    if (row_bits_W[word] == 0) continue;
    for (int64_t expert = 0; expert < num_experts; ++expert) {
      const int64_t hits = row_bits_W[word] & expert_bits_EW[expert * num_words + word];
      if (hits == 0) continue;
      for (int64_t method = 0; method < kNumMethods; ++method) {
        if (!(hits & methods_MW[method * num_words + word])) continue;
        const uint8_t asks = static_cast<uint8_t>(method + 1);
        if (asked_E[expert] == kNothing || asks < asked_E[expert]) asked_E[expert] = asks;
        any = true;
        break;
      }
    }
  }
  return any;
}

// What the experts are chosen by, [E]; `bias_E` may be null.
void choice(const Layer& layer, const float* logits_E, const float* bias_E, float* choice_E) {
  const int64_t num_experts = layer.num_experts;
  if (bias_E == nullptr) {
    std::copy_n(logits_E, num_experts, choice_E);
    return;
  }
  if (layer.scoring == kSoftmax) {
    const float largest = *std::max_element(logits_E, logits_E + num_experts);
    float sum = 0.0f;
    for (int64_t e = 0; e < num_experts; ++e) sum += choice_E[e] = std::exp(logits_E[e] - largest);
    for (int64_t e = 0; e < num_experts; ++e) {
      choice_E[e] /= sum;
      if (std::isnan(choice_E[e])) choice_E[e] = 0.0f;
    }
  } else if (layer.scoring == kSigmoid) {
    for (int64_t e = 0; e < num_experts; ++e) choice_E[e] = 1.0f / (1.0f + std::exp(-logits_E[e]));
  } else {
    for (int64_t e = 0; e < num_experts; ++e) choice_E[e] = std::sqrt(softplus(logits_E[e]));
  }
  for (int64_t e = 0; e < num_experts; ++e) choice_E[e] += bias_E[e];
}

// Which groups the router keeps, uint8 [G]: those with the highest score.
void kept_groups(const Layer& layer, const float* bias_E, Scratch& s) {
  const int64_t size = layer.num_experts / layer.num_groups;
  float lowest = kNever;
  if (bias_E != nullptr) lowest = *std::min_element(bias_E, bias_E + layer.num_experts) - 1.0f;
  for (int64_t group = 0; group < layer.num_groups; ++group) {
    float best = kNever, second = kNever;
    for (int64_t e = group * size; e < (group + 1) * size; ++e) {
      const float score = s.asked_E[e] == kReroute ? lowest : s.choice_E[e];
      if (score > best) {
        second = best;
        best = score;
      } else if (score > second) {
        second = score;
      }
    }
    s.group_score_G[group] = bias_E == nullptr ? best : best + second;
    s.in_kept_G[group] = 0;
  }
  for (int64_t nth = 0; nth < layer.topk_groups; ++nth) {
    int64_t best = -1;
    for (int64_t group = 0; group < layer.num_groups; ++group) {
      if (s.in_kept_G[group]) continue;
      if (best < 0 || s.group_score_G[group] > s.group_score_G[best]) best = group;
    }
    s.in_kept_G[best] = 1;
  }
}

float log_score(const Layer& layer, float logit, float log_denominator) {
  switch (layer.scoring) {
    case kSoftmax:
      return layer.renormalize ? logit : logit - log_denominator;
    case kSigmoid:
      return std::min(logit, 0.0f) - std::log1p(std::exp(-std::fabs(logit)));
    default:
      return 0.5f * (logit < kSoftplusIsExpBelow ? logit : std::log(softplus(logit)));
  }
}

void softmax(const float* log_K, int64_t num, float* weight_K) {
  float largest = kNever, sum = 0.0f;
  for (int64_t k = 0; k < num; ++k) largest = std::max(largest, log_K[k]);
  for (int64_t k = 0; k < num; ++k) sum += weight_K[k] = std::exp(log_K[k] - largest);
  for (int64_t k = 0; k < num; ++k) weight_K[k] /= sum;
}

// The k best of the highest tiers into `ids_K`, and their gate weights into `s.weight_K`.
void route_row(const Layer& layer, const float* bias_E, Scratch& s, int64_t* ids_K) {
  const int64_t num_experts = layer.num_experts, top_k = layer.top_k;
  choice(layer, s.logits_E.data(), bias_E, s.choice_E.data());
  const bool has_groups = layer.num_groups > 1;
  if (has_groups) kept_groups(layer, bias_E, s);
  const int64_t group_size = num_experts / layer.num_groups;
  for (int64_t e = 0; e < num_experts; ++e) {
    const bool live = s.asked_E[e] != kReroute;
    int64_t tier = live + 2 * (s.asked_E[e] == kForce);
    if (has_groups) tier = 2 * tier + (live && s.in_kept_G[e / group_size]);
    s.key_E[e] = ordered(s.choice_E[e]) + tier * kTier;
  }
  float log_denominator = 0.0f;
  if (layer.scoring == kSoftmax && !layer.renormalize) {
    const float largest = *std::max_element(s.logits_E.begin(), s.logits_E.begin() + num_experts);
    float sum = 0.0f;
    for (int64_t e = 0; e < num_experts; ++e) sum += std::exp(s.logits_E[e] - largest);
    log_denominator = largest + std::log(sum);
  }
  bool restores = false;
  for (int64_t k = 0; k < top_k; ++k) {
    const auto best = std::max_element(s.key_E.begin(), s.key_E.begin() + num_experts);
    const int64_t e = ids_K[k] = best - s.key_E.begin();
    *best = std::numeric_limits<int64_t>::min();
    restores |= s.asked_E[e] == kDropRenorm;
    s.log_weight_K[k] =
        s.asked_E[e] == kReroute ? kNever : log_score(layer, s.logits_E[e], log_denominator);
  }
  if (layer.renormalize) {
    softmax(s.log_weight_K.data(), top_k, s.weight_K.data());
  } else {
    for (int64_t k = 0; k < top_k; ++k) s.weight_K[k] = std::exp(s.log_weight_K[k]);
  }
  float sum = 0.0f;
  for (int64_t k = 0; k < top_k; ++k) {
    const uint8_t asked = s.asked_E[ids_K[k]];
    if (asked == kDrop) s.weight_K[k] = 0.0f;
    if (asked == kDrop || asked == kDropRenorm) s.log_weight_K[k] = kNever;
    sum += s.weight_K[k];
  }
  if (restores) {
    softmax(s.log_weight_K.data(), top_k, s.restored_K.data());
    for (int64_t k = 0; k < top_k; ++k) s.weight_K[k] = s.restored_K[k] * sum;
  }
  for (int64_t k = 0; k < top_k; ++k) {
    if (std::isnan(s.weight_K[k])) s.weight_K[k] = 0.0f;
  }
}

// As `nan_to_num` in `route_masked`.
float usable(float logit) {
  if (std::isnan(logit)) return kNever;
  return std::min(logit, std::numeric_limits<float>::max());
}

template <typename logit_t, typename id_t>
void route_masked_rows(const Layer& layer, const std::vector<int64_t>& rows, const at::Tensor& router_logits,
                       const at::Tensor& bias, at::Tensor& topk_weights, at::Tensor& topk_ids) {
  const int64_t num_words = layer.num_words, num_experts = layer.num_experts;
  const float* biases = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  const int64_t bias_stride = bias.defined() && bias.dim() == 2 ? bias.stride(0) : 0;
  const auto* logits = router_logits.const_data_ptr<logit_t>();
  auto* weights = topk_weights.data_ptr<float>();
  auto* ids = topk_ids.data_ptr<id_t>();
  const int64_t logit_stride = router_logits.stride(0), id_stride = topk_ids.stride(0);
  const int64_t weight_stride = topk_weights.stride(0);
  const auto scaling = static_cast<float>(layer.scaling);
  at::parallel_for(0, static_cast<int64_t>(rows.size()), kMasksAtOnce, [&](int64_t first, int64_t stop) {
    Scratch s;
    s.logits_E.resize(num_experts);
    s.choice_E.resize(num_experts);
    s.key_E.resize(num_experts);
    s.asked_E.resize(num_experts);
    s.group_score_G.resize(layer.num_groups);
    s.in_kept_G.resize(layer.num_groups);
    s.log_weight_K.resize(layer.top_k);
    s.weight_K.resize(layer.top_k);
    s.restored_K.resize(layer.top_k);
    std::vector<int64_t> ids_K(layer.top_k);
    for (int64_t nth = first; nth < stop; ++nth) {
      const int64_t row = rows[nth];
      if (!asked_of_experts(layer.row_bits_TW + row * num_words, layer.expert_bits_EW, layer.methods_MW,
                            num_words, num_experts, s.asked_E.data())) {
        continue;
      }
      for (int64_t e = 0; e < num_experts; ++e) {
        s.logits_E[e] = usable(static_cast<float>(logits[row * logit_stride + e]));
      }
      route_row(layer, biases == nullptr ? nullptr : biases + row * bias_stride, s, ids_K.data());
      for (int64_t k = 0; k < layer.top_k; ++k) {
        id_t& id = ids[row * id_stride + k];
        if (id < 0) continue;  // a padding row chooses nobody
        id = static_cast<id_t>(ids_K[k]);
        weights[row * weight_stride + k] = s.weight_K[k] * scaling;
        layer.tap_weights_TK[row * layer.tap_stride + k] = s.weight_K[k];
      }
    }
  });
}

// The rows whose bits name any mask.
std::vector<int64_t> masked_rows(const Layer& layer, int64_t num_rows) {
  std::vector<int64_t> rows;
  for (int64_t row = 0; row < num_rows; ++row) {
    int64_t any = 0;
    for (int64_t word = 0; word < layer.num_words; ++word) {
      any |= layer.row_bits_TW[row * layer.num_words + word];
    }
    if (any != 0) rows.push_back(row);
  }
  return rows;
}

}  // namespace

namespace moe_guard {

void route(const at::Tensor& router_logits, at::Tensor& topk_weights, at::Tensor& topk_ids,
           const at::Tensor& facts, int64_t layer_index, const std::optional<at::Tensor>& bias) {
  TORCH_CHECK(facts.size(1) * facts.itemsize() == sizeof(Layer), "facts are of another release");
  TORCH_CHECK(0 <= layer_index && layer_index < facts.size(0), "there is no such layer");
  const Layer& layer = reinterpret_cast<const Layer*>(facts.const_data_ptr<int64_t>())[layer_index];
  const int64_t num_rows = topk_ids.size(0), top_k = layer.top_k, tap_stride = layer.tap_stride;
  TORCH_CHECK(num_rows <= layer.max_rows, "more rows than the tap has room for");
  TORCH_CHECK(topk_weights.stride(1) == 1 && topk_ids.stride(1) == 1, "rows must be contiguous");
  const auto* weights = topk_weights.const_data_ptr<float>();
  const auto scaling = static_cast<float>(layer.scaling);
  for (int64_t row = 0; row < num_rows; ++row) {
    const float* from = weights + row * topk_weights.stride(0);
    float* to = layer.tap_weights_TK + row * tap_stride;
    for (int64_t k = 0; k < top_k; ++k) to[k] = scaling == 1.0f ? from[k] : from[k] / scaling;
  }
  if (layer.row_bits_TW != nullptr) {
    const std::vector<int64_t> rows = masked_rows(layer, num_rows);
    if (!rows.empty()) {
      const at::Tensor logits = router_logits.stride(1) == 1 ? router_logits : router_logits.contiguous();
      const at::Tensor biases = bias.has_value() ? bias->to(at::kFloat).contiguous() : at::Tensor();
      AT_DISPATCH_FLOATING_TYPES_AND2(
          at::kBFloat16, at::kHalf, logits.scalar_type(), "moe_guard_route", [&] {
            using logit_t = scalar_t;
            const auto go = [&]<typename id_t>(id_t) {
              route_masked_rows<logit_t, id_t>(layer, rows, logits, biases, topk_weights, topk_ids);
            };
            topk_ids.scalar_type() == at::kInt ? go(int32_t{}) : go(int64_t{});
          });
    }
  }
  const auto copy_ids = [&](const auto* ids) {
    for (int64_t row = 0; row < num_rows; ++row) {
      for (int64_t k = 0; k < top_k; ++k) {
        layer.tap_ids_TK[row * tap_stride + k] =
            static_cast<int32_t>(ids[row * topk_ids.stride(0) + k]);
      }
    }
  };
  if (topk_ids.scalar_type() == at::kInt) {
    copy_ids(topk_ids.const_data_ptr<int32_t>());
  } else {
    copy_ids(topk_ids.const_data_ptr<int64_t>());
  }
}

}  // namespace moe_guard

// Its schema is in `guard/device/kernels/layer_routing.py`.
TORCH_LIBRARY_IMPL(moe_guard, CPU, m) { m.impl("route_on_cpu", &moe_guard::route); }
