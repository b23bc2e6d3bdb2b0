// How often each expert was chosen, on a CPU. Its twin is `ExpertLoad` in `guard/device/load.py`.

#include "judge.h"

extern "C" {

// Adds the choices of a step's rows: of requests with a slot, accepted, not evaluated before, trusted.
// rejected_B: null where there are none; trusted_T: for each row, or one for all
// counts_LE: the rows that were counted stand behind the last layer
void moe_guard_count_load(const int32_t* ids_TLK, const float* weights_TLK, const int64_t* slots_B,
                          const int64_t* query_start_B1, const int64_t* position_T,
                          const int64_t* rejected_B, const int64_t* next_position_S,
                          const bool* trusted_T, bool one_for_all, int64_t num_requests,
                          const int64_t* num_experts_L, int64_t num_layers, int64_t max_experts,
                          int64_t top_k, int64_t* counts_LE) {
  int64_t num_counted = 0;
  for (int64_t request = 0; request < num_requests; ++request) {
    const int64_t slot = slots_B[request];
    if (slot == 0) continue;
    int64_t stop = query_start_B1[request + 1];
    if (rejected_B != nullptr) stop -= rejected_B[request];
    for (int64_t row = query_start_B1[request]; row < stop; ++row) {
      if (position_T[row] < next_position_S[slot] || !trusted_T[one_for_all ? 0 : row]) continue;
      ++num_counted;
      int64_t at = row * num_layers * top_k;
      for (int64_t layer = 0; layer < num_layers; ++layer) {
        int64_t* counts_E = counts_LE + layer * max_experts;
        for (int64_t choice = 0; choice < top_k; ++choice, ++at) {
          const int64_t expert = ids_TLK[at];
          if (expert < 0 || expert >= num_experts_L[layer] || weights_TLK[at] == 0.0f) continue;
          ++counts_E[expert];
        }
      }
    }
  }
  counts_LE[num_layers * max_experts] += num_counted;
}

}  // extern "C"
