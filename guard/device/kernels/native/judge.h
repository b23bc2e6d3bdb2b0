// What the parts of a step share, and Python knows, too: the fields, in order, are those of the
// structures in `judge.py` and `whole_step.py`. All numbers are 64 bits wide.

#pragma once

#include <cstdint>

extern "C" {

// What an expert adds to a unit signal and to a mass signal. Where it adds to more of the one kind than of
// the other, the rest goes to a signal behind the last one.
struct Addend {
  int32_t unit, mass;
  int64_t unit_value;
  double mass_value;
};

// addend_start_P1: 32 bits wide, so that those of neighbours lie in one cache line
struct SignalTables {
  const int64_t* num_experts_L;
  const int32_t* addend_start_P1;
  const Addend* addends;
  const int64_t *spread_start_P1, *spread_signal;
  const int64_t *layer_start_L1, *layer_signal;
  const double* layer_value;
  int64_t num_tokens, first_spread, first_mass, max_experts, num_columns, num_layers, top_k;
  int64_t num_linear, expert_bytes;  // behind those columns a token's experts, each of so many bytes, or 0
};

// As `DistributionTable`, and what the evaluator makes of it. An expert that was never chosen has the term
// `unchosen_ZLE`; windows are named by their kind, and have a histogram or are recent.
struct DistributionTables {
  const int64_t *window_V, *tokens_V, *in_output_V, *histogram_V, *token_signal_V, *epoch_V;
  const int64_t *window_D, *statistic_D, *takes_max_D, *baseline_D;
  const double* shares_ZLE;
  const int64_t *unchosen_ZLE, *half_entropy_ZL, *is_measured_ZL;
  const int64_t *num_experts_L, *top_k_L, *token_epoch_N;
  int64_t num_windows, num_histograms, num_layers, max_experts, top_k, expert_bytes, num_kept, num_epochs;
  int64_t first_word;
};

// distributions: null where no condition is on one
struct DecisionTables {
  const int64_t *signals, *readings, *conditions;
  const double* real;
  const int64_t *rules, *conditions_RC, *node_start_R1, *node_N, *nodes, *actions, *set_signal_N;
  int64_t num_evidence, num_signals, num_readings, num_conditions, num_rules, most_conditions;
  int64_t num_nodes, node_width, num_actions, num_sets, num_words;
  const DistributionTables* distributions;
};

struct Slots {
  int64_t *next_position_S, *prompt_tokens_S, *unseen_S, *sum_SX, *prompt_sum_SX, *recent_sum_SQX;
  int64_t *hits_SR, *recent_hits_SHR;
  bool *active_SR, *applies_SR, *enforced_SR, *exempt_SR;
  int64_t *mask_from_SIA, *mask_to_SIA, *block_at_SR;
  double* extreme_SC;
  int32_t* histogram_SHLE;
  void* recent_chosen_SQC;
  int64_t* recent_position_SQ;
  int32_t* recent_epoch_SQ;
  int64_t kept_sums, kept_hits, num_intervals;
};

// Evidence beside the KV, under one program's columns. narrow_bytes: of each number in `narrow_KX`,
// 2, 4 or 8
struct Kept {
  const int64_t* narrow_source;
  int64_t num_narrow;
  const int64_t* wide_source;
  int64_t num_wide, tag;
  int32_t* written_K;
  void* narrow_KX;
  int64_t narrow_bytes;
  int64_t* wide_KX;
};

// Where everything is that a step needs: buffers that stay, and those of the step at hand.
// query_start_B1: of `query_start_bytes` each, copied into `starts_B1` when the step begins
// row_bits_TW: null where nothing is masked; kept: null where nothing is; trusted: one for all rows
// decided: what the step's sums are, then its requests, masks and extremes, see `PackedReport`
// used_L, excluding_LEW: see `moe_guard_is_sound`; counts_LE: see `moe_guard_count_load`
struct WholeStep {
  const SignalTables* signals;
  const DecisionTables* decisions;
  const Slots* slots;
  const Kept* kept;
  bool* trusted;
  int32_t* ids_TLK;
  const float* weights_TLK;
  int64_t* row_bits_TW;
  int64_t num_words;
  const int64_t* slots_B;
  const void* query_start_B1;
  int64_t query_start_bytes;
  int64_t* starts_B1;
  const int64_t* position_T;
  int64_t* decided;
  const int64_t *used_L, *excluding_LEW;
  int64_t* counts_LE;
};

bool moe_guard_begin(const Slots* slots, const int64_t* slots_B, const int64_t* query_start_B1,
                     const int64_t* position_T, int64_t num_requests, int64_t num_rows,
                     int64_t num_rows_before, int32_t* ids_TLK, int64_t tap_width,
                     int64_t* row_bits_TW, int64_t num_words, int64_t num_actions,
                     int64_t* request_T);
void moe_guard_reduce(const SignalTables* tables, const int32_t* ids_TLK, const float* weights_TLK,
                      int64_t num_rows, const bool* trusted_T, bool one_for_all,
                      int64_t* evidence_TX);
void moe_guard_keep(const int64_t* evidence_TX, int64_t num_evidence, const int64_t* query_start_B1,
                    const int64_t* rejected_B, int64_t num_requests, const int64_t* kv_slot_T,
                    const Kept* kept);
bool moe_guard_begin_step(const WholeStep* step, int64_t num_requests, int64_t num_rows,
                          int64_t num_rows_before);
int64_t moe_guard_end_step(const WholeStep* step, int64_t num_requests, int64_t num_rows,
                           const int64_t* kv_slot_T, bool counts_load);
bool moe_guard_is_sound(const int32_t* ids_TLK, const float* weights_TLK, int64_t num_rows,
                        int64_t num_layers, int64_t top_k, const int64_t* used_L,
                        const int64_t* num_experts_L, const int64_t* excluding_LEW,
                        int64_t max_experts, const int64_t* words_TW, int64_t num_words);
void moe_guard_count_load(const int32_t* ids_TLK, const float* weights_TLK, const int64_t* slots_B,
                          const int64_t* query_start_B1, const int64_t* position_T,
                          const int64_t* rejected_B, const int64_t* next_position_S,
                          const bool* trusted_T, bool one_for_all, int64_t num_requests,
                          const int64_t* num_experts_L, int64_t num_layers, int64_t max_experts,
                          int64_t top_k, int64_t* counts_LE);
bool moe_guard_mask_rows(const Slots* slots, const int64_t* slots_B, const int64_t* query_start_B1,
                         const int64_t* position_T, int64_t num_requests, int64_t num_actions,
                         int64_t* row_bits_TW, int64_t num_words);
int64_t moe_guard_decide(const DecisionTables* tables, const Slots* slots, const int64_t* evidence_TX,
                         const int64_t* slots_B, const int64_t* query_start_B1,
                         const int64_t* position_T, const int64_t* rejected_B,
                         const int64_t* computed_B, int64_t num_requests, int64_t* requests_BF,
                         int64_t* masked_BW, float* extremes_BC, int64_t* summary);

}  // extern "C"
