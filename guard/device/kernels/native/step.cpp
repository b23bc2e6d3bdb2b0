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
enum Flag : int64_t { kBlocks = 1, kBeginsMasks = 2, kMasks = 4, kSeenAll = 8, kFirings = 16 };

}  // namespace

extern "C" {

// As `moe_guard_begin`.
void moe_guard_begin_step(const WholeStep* step, int64_t num_requests, int64_t num_rows,
                          int64_t num_rows_before) {
  if (step->query_start_bytes == 4) {
    std::copy_n(static_cast<const int32_t*>(step->query_start_B1), num_requests + 1, step->starts_B1);
  } else {
    std::copy_n(static_cast<const int64_t*>(step->query_start_B1), num_requests + 1, step->starts_B1);
  }
  moe_guard_begin(step->slots, step->slots_B, step->starts_B1, step->position_T, num_requests, num_rows,
                  num_rows_before, step->ids_TLK, step->signals->num_layers * step->signals->top_k,
                  step->row_bits_TW, step->num_words, step->decisions->num_actions, nullptr);
}

// Evidence, what is kept of it and the decisions. Returns what the step holds: flags, and firings times
// `kFirings`.
// kv_slot_T: null where nothing is kept
int64_t moe_guard_end_step(const WholeStep* step, int64_t num_requests, int64_t num_rows,
                           const int64_t* kv_slot_T) {
  thread_local std::vector<int64_t> evidence_memory, summary_memory;
  const DecisionTables& t = *step->decisions;
  const int64_t num_columns = kRequestColumns + t.num_sets;
  evidence_memory.resize(static_cast<size_t>(num_rows * t.num_evidence));
  summary_memory.resize(static_cast<size_t>(4 + num_columns));
  int64_t *evidence_TX = evidence_memory.data(), *summary = summary_memory.data();
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
