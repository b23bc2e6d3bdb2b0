// A step's beginning, evidence and decisions on a CPU. Plain C++ that Python calls through ctypes with
// addresses and sizes; what it must compute is written in `guard/device/evaluate.py` and its parts.
//
// Requests share nothing, and what a row sees of earlier ones is in its slot: sums, rings of recent
// sums, the rule's last result. So each row costs the rules that apply to its request and are in their
// phase. Arithmetic on doubles is in the twin's order: build it without fusing or reordering.
//
// Letters as in `guard/device/layout.py`. All arrays are whole and in C order.

#include "distributions.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

constexpr int64_t kFalse = 0, kUnknown = 1, kTrue = 2;
constexpr int64_t kNever = int64_t{1} << 62;
constexpr int64_t kRequest = 1, kPrompt = 2, kOutput = 3;  // `WindowKind`; else recent
constexpr int64_t kLogistic = 1, kNegativeLog = 2;         // `Transform`
constexpr int64_t kRequestColumns = 7, kEventColumns = 7, kConditionColumns = 8;
constexpr int64_t kRowsAThread = 32;  // fewer are not worth another thread
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Memory of a call that the next one uses again, so that a step allocates nothing.
template <typename T>
T* scratch(std::vector<T>& memory, int64_t size, T value) {
  memory.assign(static_cast<size_t>(size), value);
  return memory.data();
}

// A few rows are worked off without a call of OpenMP: even of one thread it makes a team, out of cold memory.
bool is_for_one(int64_t num_rows) { return num_rows < 2 * kRowsAThread; }

int num_threads(int64_t num_rows) {
  return static_cast<int>(std::clamp<int64_t>(num_rows / kRowsAThread, 1, omp_get_max_threads()));
}

// The part of a loop that is the calling thread's.
struct Share {
  int64_t first, stop;
};

Share share_of_thread(int64_t size) {
  const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
  return {size * thread / threads, size * (thread + 1) / threads};
}

}  // namespace

extern "C" {

int64_t moe_guard_sizes(int64_t which) {
  const int64_t sizes[] = {sizeof(SignalTables), sizeof(DecisionTables), sizeof(Slots),
                           sizeof(Kept),         sizeof(WholeStep),      sizeof(DistributionTables)};
  return sizes[which];
}

// The masks in force for each row, where `row_bits_TW` has none yet. Returns whether there are any.
bool moe_guard_mask_rows(const Slots* slots, const int64_t* slots_B, const int64_t* query_start_B1,
                         const int64_t* position_T, int64_t num_requests, int64_t num_actions,
                         int64_t* row_bits_TW, int64_t num_words) {
  bool any = false;
  for (int64_t request = 0; request < num_requests; ++request) {
    const int64_t first_row = query_start_B1[request], stop_row = query_start_B1[request + 1];
    const int64_t at = slots_B[request] * slots->num_intervals * num_actions;
    for (int64_t place = 0; place < slots->num_intervals; ++place) {
      const int64_t* from_A = slots->mask_from_SIA + at + place * num_actions;
      const int64_t* to_A = slots->mask_to_SIA + at + place * num_actions;
      for (int64_t action = 0; action < num_actions; ++action) {
        if (from_A[action] >= to_A[action]) continue;
        const int64_t bit = static_cast<int64_t>(uint64_t{1} << (action & 63));
        for (int64_t row = first_row; row < stop_row; ++row) {
          if (from_A[action] <= position_T[row] && position_T[row] < to_A[action]) {
            row_bits_TW[row * num_words + (action >> 6)] |= bit;
            any = true;
          }
        }
      }
    }
  }
  return any;
}

// Whose each row is, no expert in the rows' part of the tap, and the rows' masks. Returns whether any row is
// masked.
// row_bits_TW: null where nothing is masked; the first `num_rows_before` rows may be masked still
// request_T: null where nobody asks
bool moe_guard_begin(const Slots* slots, const int64_t* slots_B, const int64_t* query_start_B1,
                     const int64_t* position_T, int64_t num_requests, int64_t num_rows,
                     int64_t num_rows_before, int32_t* ids_TLK, int64_t tap_width,
                     int64_t* row_bits_TW, int64_t num_words, int64_t num_actions,
                     int64_t* request_T) {
  std::fill_n(ids_TLK, num_rows * tap_width, -1);
  bool is_masked = false;
  if (row_bits_TW != nullptr) {
    std::fill_n(row_bits_TW, std::max(num_rows, num_rows_before) * num_words, 0);
    is_masked = moe_guard_mask_rows(slots, slots_B, query_start_B1, position_T, num_requests, num_actions,
                                    row_bits_TW, num_words);
  }
  if (request_T == nullptr) return is_masked;
  for (int64_t request = 0; request < num_requests; ++request) {
    std::fill(request_T + query_start_B1[request], request_T + query_start_B1[request + 1], request);
  }
  // Rows behind the last request's: as a search for their request finds.
  std::fill(request_T + query_start_B1[num_requests], request_T + num_rows, num_requests);
  return is_masked;
}

}  // extern "C"

namespace {

// To the nearest whole number, the even one of two. As `std::nearbyint`, which is a call, 17 times a row.
int64_t rounded(double value) {
  constexpr double kExact = 0x1p51, kShift = 0x1.8p52;  // what is added has no room for a fraction
  if (std::fabs(value) < kExact) return static_cast<int64_t>((value + kShift) - kShift);
  return static_cast<int64_t>(std::nearbyint(value));
}

// A row's experts as id + 1, or 0 for nobody, behind its other evidence.
template <typename Expert>
void pack_experts(const SignalTables& t, int64_t row, const int32_t* ids_TLK, const float* weights_TLK,
                  int64_t* evidence_X) {
  std::fill_n(evidence_X + t.num_linear, t.num_columns - t.num_linear, 0);
  auto* experts_LK = reinterpret_cast<Expert*>(evidence_X + t.num_linear);
  const int64_t size = t.num_layers * t.top_k;
  for (int64_t at = 0; at < size; ++at) {
    const int64_t expert = ids_TLK[row * size + at];
    const bool is_expert = expert >= 0 && expert < t.num_experts_L[at / t.top_k];
    if (is_expert && weights_TLK[row * size + at] != 0.0f) experts_LK[at] = static_cast<Expert>(expert + 1);
  }
}

void reduce_rows(const SignalTables& t, const int32_t* ids_TLK, const float* weights_TLK,
                 const bool* trusted_T, bool one_for_all, Share share, int64_t* evidence_TX) {
  thread_local std::vector<int64_t> unit_memory, layer_memory, place_memory;
  thread_local std::vector<double> mass_memory, gate_memory;
  int64_t* place_K = scratch(place_memory, t.top_k, int64_t{0});
  double* gate_K = scratch(gate_memory, t.top_k, 0.0);
  const int64_t num_units = t.first_spread - t.num_tokens, num_spread = t.first_mass - t.first_spread;
  const int64_t num_masses = t.num_linear - t.first_mass;
  for (int64_t row = share.first; row < share.stop; ++row) {
    int64_t* evidence_X = evidence_TX + row * t.num_columns;
    if (!trusted_T[one_for_all ? 0 : row]) {
      std::fill_n(evidence_X, t.num_columns, 0);
      continue;
    }
    int64_t* units = scratch(unit_memory, num_units + 1, int64_t{0});
    double* masses = scratch(mass_memory, num_masses + 1, 0.0);
    int64_t* last_layer = scratch(layer_memory, num_spread, int64_t{-1});
    std::fill_n(evidence_X + t.first_spread, num_spread, 0);
    for (int64_t layer = 0; layer < t.num_layers; ++layer) {
      const int64_t first = (row * t.num_layers + layer) * t.top_k;
      int64_t num_chosen = 0;
      for (int64_t choice = first; choice < first + t.top_k; ++choice) {
        const int64_t expert = ids_TLK[choice];
        const double weight = weights_TLK[choice];
        if (expert < 0 || expert >= t.num_experts_L[layer] || weight == 0.0) continue;
        place_K[num_chosen] = layer * t.max_experts + expert;
        gate_K[num_chosen++] = std::isfinite(weight) ? weight : 0.0;
      }
      for (int64_t k = 0; k < num_chosen; ++k) {
        const int64_t place = place_K[k];
        const double gate = gate_K[k];
        for (int32_t at = t.addend_start_P1[place]; at < t.addend_start_P1[place + 1]; ++at) {
          const Addend& adds = t.addends[at];
          units[adds.unit] += adds.unit_value;
          masses[adds.mass] += adds.mass_value * gate;
        }
      }
      // Choice by choice, but in a register: each sum waits for the one before it.
      for (int64_t at = t.layer_start_L1[layer]; at < t.layer_start_L1[layer + 1]; ++at) {
        double sum = masses[t.layer_signal[at]];
        for (int64_t k = 0; k < num_chosen; ++k) sum += t.layer_value[at] * gate_K[k];
        masses[t.layer_signal[at]] = sum;
      }
      for (int64_t k = 0; k < (num_spread == 0 ? 0 : num_chosen); ++k) {
        for (int64_t at = t.spread_start_P1[place_K[k]]; at < t.spread_start_P1[place_K[k] + 1]; ++at) {
          const int64_t signal = t.spread_signal[at];
          if (last_layer[signal] == layer) continue;
          last_layer[signal] = layer;
          evidence_X[t.first_spread + signal] += 1;
        }
      }
    }
    std::fill_n(evidence_X, t.num_tokens, 1);
    std::copy_n(units, num_units, evidence_X + t.num_tokens);
    for (int64_t mass = 0; mass < num_masses; ++mass) {
      evidence_X[t.first_mass + mass] = rounded(masses[mass]);
    }
    if (t.expert_bytes == 1) pack_experts<uint8_t>(t, row, ids_TLK, weights_TLK, evidence_X);
    if (t.expert_bytes == 2) pack_experts<int16_t>(t, row, ids_TLK, weights_TLK, evidence_X);
  }
}

}  // namespace

extern "C" {

// Evidence of each row from the experts that it chose, int64 [T, columns]. Adds in the order of layers
// and choices, as the twin does.
// trusted_T: for each row, or one for all; the others' evidence is 0
void moe_guard_reduce(const SignalTables* tables, const int32_t* ids_TLK, const float* weights_TLK,
                      int64_t num_rows, const bool* trusted_T, bool one_for_all,
                      int64_t* evidence_TX) {
  if (is_for_one(num_rows)) {
    reduce_rows(*tables, ids_TLK, weights_TLK, trusted_T, one_for_all, {0, num_rows}, evidence_TX);
    return;
  }
#pragma omp parallel num_threads(num_threads(num_rows))
  reduce_rows(*tables, ids_TLK, weights_TLK, trusted_T, one_for_all, share_of_thread(num_rows), evidence_TX);
}

}  // extern "C"

namespace {

template <typename T>
void keep_rows(const int64_t* evidence_TX, int64_t num_evidence, const int64_t* query_start_B1,
               const int64_t* rejected_B, int64_t num_requests, const int64_t* kv_slot_T,
               const Kept& kept, T* narrow_KX) {
  for (int64_t request = 0; request < num_requests; ++request) {
    int64_t stop = query_start_B1[request + 1];
    if (rejected_B != nullptr) stop -= rejected_B[request];
    for (int64_t row = query_start_B1[request]; row < stop; ++row) {
      const int64_t at = kv_slot_T[row];
      if (at < 0) continue;
      const int64_t* evidence_X = evidence_TX + row * num_evidence;
      for (int64_t column = 0; column < kept.num_narrow; ++column) {
        narrow_KX[at * kept.num_narrow + column] =
            static_cast<T>(evidence_X[kept.narrow_source[column]]);
      }
      for (int64_t column = 0; column < kept.num_wide; ++column) {
        kept.wide_KX[at * kept.num_wide + column] = evidence_X[kept.wide_source[column]];
      }
      // Last: the token was seen.
      kept.written_K[at] = static_cast<int32_t>(evidence_X[0] * kept.tag);
    }
  }
}

}  // namespace

extern "C" {

// Evidence beside its KV, as `KeepRows.write`, but for the dustbin, which stays as it is.
// rejected_B: null where there are none
void moe_guard_keep(const int64_t* evidence_TX, int64_t num_evidence, const int64_t* query_start_B1,
                    const int64_t* rejected_B, int64_t num_requests, const int64_t* kv_slot_T,
                    const Kept* kept) {
  const auto keep = [&](auto* narrow) {
    keep_rows(evidence_TX, num_evidence, query_start_B1, rejected_B, num_requests, kv_slot_T, *kept,
              narrow);
  };
  if (kept->narrow_bytes == 2) {
    keep(static_cast<int16_t*>(kept->narrow_KX));
  } else if (kept->narrow_bytes == 4) {
    keep(static_cast<int32_t*>(kept->narrow_KX));
  } else {
    keep(static_cast<int64_t*>(kept->narrow_KX));
  }
}

}  // extern "C"

namespace {

// What a row's windows reach back to.
struct Row {
  int64_t position, prompt, begin, following;
  const int64_t *signal_X, *total_X, *before_X, *prompt_X, *recent_QX;
  int64_t num_signals, kept_sums, recent_at;  // the latter: position % kept_sums
};

// One signal summed over a window that ends at a row, as `WindowReader` does.
int64_t read(const int64_t* reading, const Row& row) {
  const int64_t signal = reading[0], window = reading[1], tokens = reading[2];
  const int64_t value = row.total_X[signal];
  if (window == kRequest) return value;
  if (window == kPrompt) return row.position >= row.prompt - 1 ? row.prompt_X[signal] : 0;
  if (window == kOutput) {
    return row.position >= row.prompt ? value - row.prompt_X[signal] : 0;
  }
  const int64_t start = row.position - tokens;
  if (reading[3] && start < row.prompt) return value - row.prompt_X[signal];
  const auto recent = [&] {  // no window is longer than what is kept
    const int64_t at = row.recent_at - tokens;
    return row.recent_QX[(at < 0 ? at + row.kept_sums : at) * row.num_signals + signal];
  };
  if (start >= row.begin) return tokens == 1 ? row.signal_X[signal] : value - recent();
  if (std::max(start, int64_t{-1}) >= row.following - 1) return value - row.before_X[signal];
  return start >= 0 ? value - recent() : value;
}

// One condition at a row, and its extreme, as `ConditionEvaluator.evaluate`. Returns its truth.
// distribution: what it compares in place of a quotient, if it is on one
int64_t compare(const int64_t* condition, const double* real, const int64_t* value_M, double distribution,
                double* value_of, double* extreme) {
  const bool is_on_distribution = condition[7] >= 0;
  const double tokens = static_cast<double>(value_M[condition[1]]);
  double denominator = tokens * real[1] + real[2];
  if (condition[2] >= 0) denominator = static_cast<double>(value_M[condition[2]]);
  const double sign = real[6];
  double value = kNaN;
  int64_t held = kUnknown;
  if (condition[6]) {
    value = 1.0;
    held = kTrue;
  } else if (value_M[condition[1]] >= condition[3] && denominator > 0 &&
             !(is_on_distribution && std::isnan(distribution))) {
    double quotient = (static_cast<double>(value_M[condition[0]]) + real[0]) / denominator;
    if (condition[4] == kNegativeLog) quotient = -std::log(quotient);
    if (is_on_distribution) quotient = distribution;
    const double signed_quotient = quotient * sign;
    const bool holds = condition[5] ? signed_quotient > real[4] : signed_quotient >= real[5];
    held = holds ? kTrue : kFalse;
    value = quotient + real[3];
    if (condition[4] == kLogistic) value = 1.0 / (1.0 + std::exp(-value));
  }
  *value_of = value;
  const double signed_value = value * sign;
  // Neither what is unknown counts nor what is infinitely far on the other side.
  if (signed_value > -kInfinity && !(signed_value <= *extreme * sign)) *extreme = signed_value * sign;
  return held;
}

// `MaskSchedule.update` for one request.
void update_masks(int64_t start, const DecisionTables& t, const bool* enforced_R, const bool* active_R,
                  const int64_t* num_fired_R, int64_t num_intervals, int64_t* from_IA, int64_t* to_IA) {
  const int64_t num = t.num_actions;
  for (int64_t action = 0; action < num; ++action) {
    const int64_t rule = t.actions[action];
    if (!enforced_R[rule] || !t.actions[num + action]) continue;
    const bool clears = t.actions[2 * num + action] != 0;
    const bool begins = num_fired_R[rule] > 0 && (active_R[rule] || !clears);
    const bool in_force = from_IA[action] <= start && start < to_IA[action];
    if (begins) {
      if (!in_force) {
        if (from_IA[action] < to_IA[action]) {
          for (int64_t place = num_intervals - 1; place > 0; --place) {
            from_IA[place * num + action] = from_IA[(place - 1) * num + action];
            to_IA[place * num + action] = to_IA[(place - 1) * num + action];
          }
        }
        from_IA[action] = start;
      }
      to_IA[action] = std::min(start + t.actions[3 * num + action], kNever);
    } else if (clears && !active_R[rule] && in_force) {
      to_IA[action] = start;
    }
  }
}

// The last step's firings, until they are taken.
struct Firings {
  std::vector<int64_t> events;
  std::vector<double> values;
  std::vector<char> acting;
  int64_t most_conditions = 0;

  void clear() {
    events.clear();
    values.clear();
    acting.clear();
  }

  void append(const Firings& others) {
    events.insert(events.end(), others.events.begin(), others.events.end());
    values.insert(values.end(), others.values.begin(), others.values.end());
    acting.insert(acting.end(), others.acting.begin(), others.acting.end());
  }
};
thread_local Firings last_firings;

// What a step is decided from, and where it is written.
struct Step {
  const int64_t *evidence_TX, *slots_B, *query_start_B1, *position_T, *rejected_B, *computed_B;
  int64_t *requests_BF, *masked_BW;
  float* extremes_BC;
};

void summarise(const DecisionTables& t, const Step& step, int64_t num_requests, int64_t* summary) {
  bool blocks = false, begins_masks = false, masks = false, is_all_seen = num_requests > 0;
  const int64_t num_columns = kRequestColumns + t.num_sets;
  int64_t* sums_F = summary + 4;
  std::fill_n(sums_F, num_columns, 0);
  for (int64_t request = 0; request < num_requests; ++request) {
    const int64_t* facts_F = step.requests_BF + request * num_columns;
    blocks |= facts_F[0] < kNever;
    begins_masks |= facts_F[1] < kNever;
    is_all_seen &= facts_F[5] == 1 && facts_F[4] <= 0 && facts_F[6] <= 0;
    for (int64_t word = 0; word < t.num_words; ++word) {
      masks |= step.masked_BW[request * t.num_words + word] != 0;
    }
    for (int64_t column = 0; column < num_columns; ++column) {
      // NEVER adds up beyond the largest number, and nobody reads it: no undefined behaviour here.
      sums_F[column] = static_cast<int64_t>(static_cast<uint64_t>(sums_F[column]) +
                                            static_cast<uint64_t>(facts_F[column]));
    }
  }
  summary[0] = blocks;
  summary[1] = begins_masks;
  summary[2] = masks;
  summary[3] = is_all_seen;
}

template <typename T>
void prefetch(const T* first, int64_t size) {
  const char* at = reinterpret_cast<const char*>(first);
  for (int64_t byte = 0; byte < size * static_cast<int64_t>(sizeof(T)); byte += 64) {
    __builtin_prefetch(at + byte);
  }
}

// A request's slot, while the one before it is decided: slots lie far apart, and are cold.
void prefetch_slot(const DecisionTables& t, const Slots& s, const Step& step, int64_t request) {
  const int64_t slot = step.slots_B[request], X = t.num_signals, R = t.num_rules;
  const int64_t position = step.position_T[step.query_start_B1[request]];
  prefetch(s.sum_SX + slot * X, X);
  prefetch(s.prompt_sum_SX + slot * X, X);
  prefetch(s.recent_sum_SQX + (slot * s.kept_sums + position % s.kept_sums) * X, X);
  prefetch(s.extreme_SC + slot * t.num_conditions, t.num_conditions);
  prefetch(s.block_at_SR + slot * R, R);
  for (const bool* flags_SR : {s.active_SR, s.applies_SR, s.enforced_SR, s.exempt_SR}) {
    prefetch(flags_SR + slot * R, R);
  }
}

void decide_requests(const DecisionTables& t, const Slots& s, const Step& step, Share share,
                     Firings& firings) {
  thread_local std::vector<int64_t> signal_memory, before_memory, hits_memory, fired_memory;
  thread_local std::vector<int64_t> here_memory, now_memory, row_memory, value_memory, truth_memory;
  thread_local std::vector<double> condition_memory;
  const int64_t X = t.num_signals, C = t.num_conditions, R = t.num_rules, A = t.num_actions;
  const bool persists = s.kept_hits > 1;
  int64_t* signal_X = scratch(signal_memory, X, int64_t{0});
  int64_t* before_X = scratch(before_memory, X, int64_t{0});
  int64_t* hits_before_R = scratch(hits_memory, R, int64_t{0});
  int64_t* num_fired_R = scratch(fired_memory, R, int64_t{0});
  int64_t* rules_here = scratch(here_memory, R, int64_t{0});
  int64_t* rules_now = scratch(now_memory, R, int64_t{0});
  int64_t* row_M = scratch(row_memory, t.num_readings, int64_t{-1});
  int64_t* value_M = scratch(value_memory, t.num_readings, int64_t{0});
  double* value_C = scratch(condition_memory, C, 0.0);
  int64_t* truth = scratch(truth_memory, 1 + C + t.num_nodes, kTrue);
  firings.clear();
  for (int64_t request = share.first; request < share.stop; ++request) {
    const int64_t slot = step.slots_B[request];
    if (request + 1 < share.stop) prefetch_slot(t, s, step, request + 1);
    const int64_t* position_T = step.position_T;
    int64_t* facts_F = step.requests_BF + request * (kRequestColumns + t.num_sets);
    int64_t* masked_W = step.masked_BW + request * t.num_words;
    float* extremes_C = step.extremes_BC + request * C;
    std::fill_n(facts_F, kRequestColumns + t.num_sets, 0);
    std::fill_n(masked_W, t.num_words, 0);
    facts_F[0] = facts_F[1] = kNever;
    if (slot == 0) {
      std::fill_n(extremes_C, C, std::numeric_limits<float>::quiet_NaN());
      continue;
    }
    const int64_t start_row = step.query_start_B1[request];
    int64_t last_row = step.query_start_B1[request + 1] - 1;
    if (step.rejected_B != nullptr) last_row -= step.rejected_B[request];
    const int64_t following = s.next_position_S[slot], prompt = s.prompt_tokens_S[slot];
    const int64_t begin = std::max(following, position_T[start_row]);
    const int64_t after = std::max(following, position_T[last_row] + 1);
    const int64_t first_row = start_row + begin - position_T[start_row];
    int64_t* total_X = s.sum_SX + slot * X;
    int64_t* prompt_X = s.prompt_sum_SX + slot * X;
    int64_t* recent_QX = s.recent_sum_SQX + slot * s.kept_sums * X;
    int64_t* hits_R = s.hits_SR + slot * R;
    int64_t* recent_HR = s.recent_hits_SHR + slot * s.kept_hits * R;
    bool* active_R = s.active_SR + slot * R;
    const bool* applies_R = s.applies_SR + slot * R;
    const bool* enforced_R = s.enforced_SR + slot * R;
    const bool* exempt_R = s.exempt_SR + slot * R;
    int64_t* block_at_R = s.block_at_SR + slot * R;
    double* extreme_C = s.extreme_SC + slot * C;
    std::copy_n(total_X, X, before_X);
    if (persists) std::copy_n(hits_R, R, hits_before_R);
    std::fill_n(num_fired_R, R, 0);
    int64_t num_here = 0, newest = 0;
    for (int64_t rule = 0; rule < R; ++rule) {
      if (!applies_R[rule]) continue;
      rules_here[num_here++] = rule;
      newest = std::max(newest, t.rules[8 * R + rule]);
    }
    int64_t prompt_tokens = 0, output_tokens = 0;
    for (int64_t row = first_row; row <= last_row; ++row) {
      const int64_t position = position_T[row];
      const int64_t* evidence_X = step.evidence_TX + row * t.num_evidence;
      for (int64_t signal = 0; signal < X; ++signal) {
        const int64_t source = t.signals[signal];
        int64_t value = evidence_X[source];
        if (source != signal) {  // an indicator
          value = value >= t.signals[2 * X + signal] ? evidence_X[t.signals[X + signal]] : 0;
        }
        signal_X[signal] = value;
        total_X[signal] += value;
      }
      if (position == prompt - 1) std::copy_n(total_X, X, prompt_X);
      const bool judged = evidence_X[0] != 0, in_prompt = position < prompt;
      if (judged) ++(in_prompt ? prompt_tokens : output_tokens);
      int64_t num_now = 0;
      const moe_guard::DistributionRow distributed{t.distributions, &s,       step.evidence_TX, t.num_evidence, slot,
                                                   row,             position, prompt,           begin};
      if (t.distributions != nullptr) moe_guard::count_row(distributed);
      const Row here{position, prompt,   begin,     following, signal_X,    total_X,
                     before_X, prompt_X, recent_QX, X,         s.kept_sums, position % s.kept_sums};
      for (int64_t nth_rule = 0; nth_rule < (judged ? num_here : 0); ++nth_rule) {
        const int64_t rule = rules_here[nth_rule];
        if (!t.rules[(in_prompt ? 1 : 2) * R + rule] || !signal_X[t.rules[7 * R + rule]]) continue;
        rules_now[num_now++] = rule;
        for (int64_t nth = 0; nth < t.most_conditions; ++nth) {
          const int64_t at = t.conditions_RC[rule * t.most_conditions + nth];
          if (at < 0) continue;
          const int64_t* condition = t.conditions + at * kConditionColumns;
          for (int64_t nth_reading = 0; nth_reading < 3; ++nth_reading) {
            const int64_t reading = condition[nth_reading];
            if (reading < 0 || row_M[reading] == row) continue;
            row_M[reading] = row;
            value_M[reading] = read(t.readings + reading * 4, here);
          }
          double distribution = kNaN;
          if (condition[7] >= 0 && row == last_row && position >= prompt - 1) {
            distribution = moe_guard::distribution_value(distributed, condition[7]);
          }
          truth[1 + at] = compare(condition, t.real + at * 7, value_M, distribution, value_C + at,
                                  extreme_C + at);
        }
      }
      for (int64_t nth_rule = 0; nth_rule < num_now; ++nth_rule) {
        const int64_t rule = rules_now[nth_rule];
        for (int64_t nth = t.node_start_R1[rule]; nth < t.node_start_R1[rule + 1]; ++nth) {
          const int64_t column = t.node_N[nth];
          const int64_t* node = t.nodes + (column - 1 - C) * t.node_width;
          int64_t least = kTrue;  // of its children, see `ExpressionTable`
          for (int64_t child = 0; child < t.node_width; ++child) {
            const int64_t value = truth[node[child] >> 1];
            least = std::min(least, node[child] & 1 ? kTrue - value : value);
          }
          truth[column] = least;
        }
        const int64_t root = t.rules[rule];
        bool holds = truth[root >> 1] == (root & 1 ? kFalse : kTrue);
        if (persists) {
          hits_R[rule] += holds;
          const int64_t start = std::max(position - t.rules[4 * R + rule], int64_t{-1});
          int64_t earlier = 0;
          if (start < begin && start >= following - 1) {
            earlier = hits_before_R[rule];
          } else if (start >= 0) {
            earlier = recent_HR[(start % s.kept_hits) * R + rule];
          }
          holds = hits_R[rule] - earlier >= t.rules[3 * R + rule];
        }
        const bool fires = holds && !active_R[rule];
        active_R[rule] = holds;
        if (!fires) continue;
        ++num_fired_R[rule];
        if (t.rules[5 * R + rule] && enforced_R[rule]) {
          block_at_R[rule] = std::min(block_at_R[rule], std::max(position, prompt - 1));
        }
        const int64_t event[kEventColumns] = {
            request,          rule,
            position,         in_prompt,
            enforced_R[rule], position + 1 - total_X[t.rules[8 * R + rule]],
            exempt_R[rule],
        };
        firings.events.insert(firings.events.end(), event, event + kEventColumns);
        for (int64_t nth = 0; nth < t.most_conditions; ++nth) {
          const int64_t at = t.conditions_RC[rule * t.most_conditions + nth];
          firings.values.push_back(at >= 0 ? value_C[at] : kNaN);
        }
        firings.acting.push_back(t.rules[6 * R + rule] && enforced_R[rule] && num_fired_R[rule] == 1);
      }
      if (s.kept_sums > 1) std::copy_n(total_X, X, recent_QX + here.recent_at * X);
      if (t.distributions != nullptr && judged && position >= after - t.distributions->num_kept) {
        moe_guard::keep_row(distributed);
      }
      if (persists) std::copy_n(hits_R, R, recent_HR + (position % s.kept_hits) * R);
    }
    s.unseen_S[slot] += after - following - prompt_tokens - output_tokens;
    s.next_position_S[slot] = after;
    int64_t* from_IA = s.mask_from_SIA + slot * s.num_intervals * A;
    int64_t* to_IA = s.mask_to_SIA + slot * s.num_intervals * A;
    int64_t begins_at = std::max(after, prompt);
    if (step.computed_B != nullptr) begins_at = std::max(begins_at, step.computed_B[request]);
    update_masks(begins_at, t, enforced_R, active_R, num_fired_R, s.num_intervals, from_IA, to_IA);
    for (int64_t place = 0; place < s.num_intervals; ++place) {
      for (int64_t action = 0; action < A; ++action) {
        const int64_t first = from_IA[place * A + action], stop = to_IA[place * A + action];
        if (first < stop && t.actions[A + action]) facts_F[1] = std::min(facts_F[1], first);
        if (first <= after && after < stop) {
          masked_W[action >> 6] |= static_cast<int64_t>(uint64_t{1} << (action & 63));
        }
      }
    }
    for (int64_t rule = 0; rule < R; ++rule) {
      if (t.rules[5 * R + rule] && block_at_R[rule] < kNever) {
        facts_F[0] = std::min(facts_F[0], block_at_R[rule] * R + rule);
      }
    }
    facts_F[2] = prompt_tokens;
    facts_F[3] = output_tokens;
    facts_F[4] = s.unseen_S[slot];
    facts_F[5] = 1;
    facts_F[6] = num_here ? after - total_X[newest] : 0;
    for (int64_t nth = 0; nth < t.num_sets; ++nth) {
      const int64_t signal = t.set_signal_N[nth];
      facts_F[kRequestColumns + nth] = total_X[signal] - before_X[signal];
    }
    for (int64_t at = 0; at < C; ++at) extremes_C[at] = static_cast<float>(extreme_C[at]);
  }
}

}  // namespace

extern "C" {

// Advance the slots by a step, write the last four arrays, and return the number of firings, which
// `moe_guard_take_firings` gives to the same thread.
// rejected_B, computed_B: null where there are none
// summary: the fields of `StepSummary`, its sums last
int64_t moe_guard_decide(const DecisionTables* tables, const Slots* slots, const int64_t* evidence_TX,
                         const int64_t* slots_B, const int64_t* query_start_B1,
                         const int64_t* position_T, const int64_t* rejected_B,
                         const int64_t* computed_B, int64_t num_requests, int64_t* requests_BF,
                         int64_t* masked_BW, float* extremes_BC, int64_t* summary) {
  const Step step{evidence_TX, slots_B,     query_start_B1, position_T, rejected_B,
                  computed_B,  requests_BF, masked_BW,      extremes_BC};
  thread_local std::vector<Firings> memory;
  std::vector<Firings>& by_thread = memory;  // the caller's, in all threads
  const bool is_alone = is_for_one(num_requests);
  const int threads = is_alone ? 1 : num_threads(num_requests);
  by_thread.resize(threads);
  for (Firings& each : by_thread) each.clear();
  if (is_alone) {
    decide_requests(*tables, *slots, step, {0, num_requests}, by_thread[0]);
  } else {
#pragma omp parallel num_threads(threads)
    decide_requests(*tables, *slots, step, share_of_thread(num_requests), by_thread[omp_get_thread_num()]);
  }
  summarise(*tables, step, num_requests, summary);
  last_firings.clear();
  last_firings.most_conditions = tables->most_conditions;
  for (const Firings& each : by_thread) last_firings.append(each);
  return static_cast<int64_t>(last_firings.acting.size());
}

// In front the first firing of each request and rule that acts; the others behind, in their order.
void moe_guard_take_firings(int64_t* events_V, double* values_V) {
  const Firings& firings = last_firings;
  const int64_t width = firings.most_conditions;
  for (const bool wanted : {true, false}) {
    for (size_t event = 0; event < firings.acting.size(); ++event) {
      if (static_cast<bool>(firings.acting[event]) != wanted) continue;
      events_V = std::copy_n(firings.events.data() + event * kEventColumns, kEventColumns, events_V);
      values_V = std::copy_n(firings.values.data() + event * width, width, values_V);
    }
  }
}

}  // extern "C"

extern "C" {

// Whether the running check would find nothing: every used place names an expert of the layer, none has
// weight twice, no weight is infinite or none, and no expert has weight that a row's masks exclude.
// used_L: places of the layer that must name an expert, from the first on
// excluding_LEW: the mask actions that exclude each expert; null where no row is under a mask
bool moe_guard_is_sound(const int32_t* ids_TLK, const float* weights_TLK, int64_t num_rows,
                        int64_t num_layers, int64_t top_k, const int64_t* used_L,
                        const int64_t* num_experts_L, const int64_t* excluding_LEW,
                        int64_t max_experts, const int64_t* words_TW, int64_t num_words) {
  for (int64_t row = 0; row < num_rows; ++row) {
    for (int64_t layer = 0; layer < num_layers; ++layer) {
      const int32_t* ids_K = ids_TLK + (row * num_layers + layer) * top_k;
      const float* weights_K = weights_TLK + (row * num_layers + layer) * top_k;
      for (int64_t k = 0; k < top_k; ++k) {
        const bool is_expert = ids_K[k] >= 0 && ids_K[k] < num_experts_L[layer];
        if (!is_expert) {
          if (k < used_L[layer]) return false;
          continue;
        }
        if (!std::isfinite(weights_K[k])) return false;
        if (weights_K[k] == 0.0f) continue;
        for (int64_t other = 0; other < k; ++other) {
          if (ids_K[other] == ids_K[k] && weights_K[other] != 0.0f) return false;
        }
        if (excluding_LEW == nullptr) continue;
        const int64_t* excluding_W = excluding_LEW + (layer * max_experts + ids_K[k]) * num_words;
        for (int64_t word = 0; word < num_words; ++word) {
          if (excluding_W[word] & words_TW[row * num_words + word]) return false;
        }
      }
    }
  }
  return true;
}

}  // extern "C"
