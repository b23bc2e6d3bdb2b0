// A whole step in two calls, for one in which there is nothing out of the ordinary. What it computes is
// in `judge.cpp`; here is what Python would do between its parts. Right behind a forward the caches hold
// the model, and each function, tensor and line of Python that a step touches costs what it takes to
// fetch it again, which is many times what it costs warm.
//
// Letters as in `guard/device/layout.py`.

#include "judge.h"

#include <algorithm>
#include <vector>

namespace {

constexpr int64_t kRequestColumns = 7;
enum Flag : int64_t { kBlocks = 1, kBeginsMasks = 2, kMasks = 4, kSeenAll = 8, kFirings = 32 };

}  // namespace

extern "C" {

// As `moe_guard_begin`.
bool moe_guard_begin_step(const WholeStep* step, int64_t num_requests, int64_t num_rows,
                          int64_t num_rows_before) {
  if (step->query_start_bytes == 4) {
    std::copy_n(static_cast<const int32_t*>(step->query_start_B1), num_requests + 1, step->starts_B1);
  } else {
    std::copy_n(static_cast<const int64_t*>(step->query_start_B1), num_requests + 1, step->starts_B1);
  }
  return moe_guard_begin(step->slots, step->slots_B, step->starts_B1, step->position_T, num_requests,
                         num_rows, num_rows_before, step->ids_TLK,
                         step->signals->num_layers * step->signals->top_k, step->row_bits_TW,
                         step->num_words, step->decisions->num_actions, nullptr);
}

// Whether the running check finds nothing, and then rows are trusted from here on. What masks ask is asked
// of the slots, not of the rows' bits, by which the routers went.
bool moe_guard_step_is_sound(const WholeStep* step, int64_t num_requests, int64_t num_rows) {
  thread_local std::vector<int64_t> words_memory;
  const SignalTables& s = *step->signals;
  const DecisionTables& d = *step->decisions;
  bool is_masked = false;
  if (step->excluding_LEW != nullptr) {
    words_memory.assign(static_cast<size_t>(num_rows * d.num_words), 0);
    is_masked = moe_guard_mask_rows(step->slots, step->slots_B, step->starts_B1, step->position_T,
                                    num_requests, d.num_actions, words_memory.data(), d.num_words);
  }
  if (!moe_guard_is_sound(step->ids_TLK, step->weights_TLK, num_rows, s.num_layers, s.top_k, step->used_L,
                          s.num_experts_L, is_masked ? step->excluding_LEW : nullptr, s.max_experts,
                          words_memory.data(), d.num_words)) {
    return false;
  }
  *step->trusted = true;
  return true;
}

// Evidence, what is kept of it and the decisions. Returns what the step holds: flags, and firings times
// `kFirings`.
// kv_slot_T: null where nothing is kept; counts_load: this step's choices are counted
int64_t moe_guard_end_step(const WholeStep* step, int64_t num_requests, int64_t num_rows,
                           const int64_t* kv_slot_T, bool counts_load) {
  thread_local std::vector<int64_t> evidence_memory, summary_memory;
  const DecisionTables& t = *step->decisions;
  const int64_t num_columns = kRequestColumns + t.num_sets;
  evidence_memory.resize(static_cast<size_t>(num_rows * t.num_evidence));
  summary_memory.resize(static_cast<size_t>(4 + num_columns));
  int64_t *evidence_TX = evidence_memory.data(), *summary = summary_memory.data();
  if (counts_load) {
    moe_guard_count_load(step->ids_TLK, step->weights_TLK, step->slots_B, step->starts_B1, step->position_T,
                         nullptr, step->slots->next_position_S, step->trusted, true, num_requests,
                         step->signals->num_experts_L, step->signals->num_layers, step->signals->max_experts,
                         step->signals->top_k, step->counts_LE);
  }
  moe_guard_reduce(step->signals, step->ids_TLK, step->weights_TLK, num_rows, step->trusted, true,
                   evidence_TX);
  if (kv_slot_T != nullptr) {
    moe_guard_keep(evidence_TX, t.num_evidence, step->starts_B1, nullptr, num_requests, kv_slot_T,
                   step->kept);
  }
  int64_t* requests_BF = step->decided + num_columns;
  int64_t* masked_BW = requests_BF + num_requests * num_columns;
  float* extremes_BC = reinterpret_cast<float*>(masked_BW + num_requests * t.num_words);
  const int64_t num_firings =
      moe_guard_decide(&t, step->slots, evidence_TX, step->slots_B, step->starts_B1, step->position_T,
                       nullptr, nullptr, num_requests, requests_BF, masked_BW, extremes_BC, summary);
  std::copy_n(summary + 4, num_columns, step->decided);
  return num_firings * kFirings + (summary[0] ? kBlocks : 0) + (summary[1] ? kBeginsMasks : 0) +
         (summary[2] ? kMasks : 0) + (summary[3] ? kSeenAll : 0);
}

}  // extern "C"
