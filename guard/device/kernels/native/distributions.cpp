// Letters beyond those of `judge.cpp`: D conditions, V windows, H histograms, Z baselines, Q tokens that a
// slot keeps, N epochs. An expert is kept as its id + 1, and nobody as 0.

#include "distributions.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace moe_guard {
namespace {

constexpr double kTermScale = 0x1p50, kValueScale = 0x1p44;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kPrompt = 2, kOutput = 3;  // `WindowKind`
constexpr int64_t kEntropy = 1, kConcentration = 2;       // `Statistic`

double xlogx(double x) { return x == 0.0 ? 0.0 : x * std::log(x); }

int64_t to_whole(double value, double scale) {
  return static_cast<int64_t>(std::nearbyint(value * scale));
}

bool is_seen(const DistributionRow& row, int64_t at_row, int64_t window) {
  return row.evidence_TX[at_row * row.num_evidence + row.tables->token_signal_V[window]] != 0;
}

template <typename Expert>
const Expert* experts_of_row(const DistributionRow& row, int64_t at_row) {
  const int64_t* evidence_X = row.evidence_TX + at_row * row.num_evidence;
  return reinterpret_cast<const Expert*>(evidence_X + row.tables->first_word);
}

template <typename Expert>
void add(const DistributionTables& t, const Expert* experts_LK, int32_t* counts_LE) {
  for (int64_t layer = 0; layer < t.num_layers; ++layer) {
    for (int64_t k = 0; k < t.top_k; ++k) {
      const int64_t expert = experts_LK[layer * t.top_k + k];
      if (expert > 0) ++counts_LE[layer * t.max_experts + expert - 1];
    }
  }
}

template <typename Expert>
void count(const DistributionRow& row) {
  const DistributionTables& t = *row.tables;
  const int64_t size = t.num_layers * t.max_experts;
  const bool in_prompt = row.position < row.prompt;
  for (int64_t window = 0; window < t.num_windows; ++window) {
    const int64_t histogram = t.histogram_V[window], kind = t.window_V[window];
    if (histogram < 0 || !is_seen(row, row.row, window)) continue;
    if (kind == (in_prompt ? kOutput : kPrompt)) continue;
    int32_t* counts_LE = row.slots->histogram_SHLE + (row.slot * t.num_histograms + histogram) * size;
    add(t, experts_of_row<Expert>(row, row.row), counts_LE);
  }
}

// The last tokens up to this one: those of the step from its evidence, the others from the slot.
template <typename Expert>
void count_recent(const DistributionRow& row, int64_t window, int32_t* counts_LE) {
  const DistributionTables& t = *row.tables;
  std::fill_n(counts_LE, t.num_layers * t.max_experts, 0);
  const int64_t first = std::max<int64_t>(
      t.in_output_V[window] ? row.prompt : 0, row.position - t.tokens_V[window] + 1);
  for (int64_t position = row.position; position >= first; --position) {
    if (position >= row.begin) {
      const int64_t here = row.row - (row.position - position);
      if (is_seen(row, here, window)) add(t, experts_of_row<Expert>(row, here), counts_LE);
      continue;
    }
    const int64_t at = row.slot * t.num_kept + position % t.num_kept;
    // What a place holds may be of a position further back, where later ones were unseen.
    if (row.slots->recent_position_SQ[at] != position) continue;
    if (row.slots->recent_epoch_SQ[at] < t.epoch_V[window]) continue;
    const auto* kept_SQC = static_cast<const Expert*>(row.slots->recent_chosen_SQC);
    add(t, kept_SQC + at * t.num_layers * t.top_k, counts_LE);
  }
}

template <typename Expert>
void keep(const DistributionRow& row) {
  const DistributionTables& t = *row.tables;
  const int64_t at = row.slot * t.num_kept + row.position % t.num_kept;
  auto* kept_SQC = static_cast<Expert*>(row.slots->recent_chosen_SQC);
  const int64_t size = t.num_layers * t.top_k;
  std::copy_n(experts_of_row<Expert>(row, row.row), size, kept_SQC + at * size);
  int32_t epoch = 0;
  for (int64_t n = 0; n < t.num_epochs; ++n) {
    if (row.evidence_TX[row.row * row.num_evidence + n] != 0) {
      epoch = std::max(epoch, static_cast<int32_t>(t.token_epoch_N[n]));
    }
  }
  row.slots->recent_position_SQ[at] = row.position;
  row.slots->recent_epoch_SQ[at] = epoch;
}

// The entropy of the mean less the mean of the entropies, of whole numbers. An expert that was never
// chosen has its share's term, which is at hand.
double divergence(const DistributionTables& t, int64_t baseline, int64_t layer, const int32_t* counts_E,
                  int64_t total) {
  const int64_t at = baseline * t.num_layers + layer;
  if (!t.is_measured_ZL[at]) return kNaN;
  const double *shares_E = t.shares_ZLE + at * t.max_experts, all = static_cast<double>(total);
  const int64_t* unchosen_E = t.unchosen_ZLE + at * t.max_experts;
  int64_t sum = 0;
  for (int64_t expert = 0; expert < t.max_experts; ++expert) {
    if (counts_E[expert] == 0) {
      sum += unchosen_E[expert];
      continue;
    }
    const double p = counts_E[expert] / all;
    sum += to_whole(xlogx(p) / 2 - xlogx((p + shares_E[expert]) / 2), kTermScale);
  }
  return static_cast<double>(std::max<int64_t>(sum - t.half_entropy_ZL[at], 0)) / kTermScale;
}

double of_layer(const DistributionTables& t, int64_t d, int64_t layer, const int32_t* counts_E) {
  int64_t total = 0, squares = 0;
  int32_t most = 0;
  for (int64_t expert = 0; expert < t.max_experts; ++expert) {
    const int64_t count = counts_E[expert];
    total += count;
    squares += count * count;
    most = std::max(most, counts_E[expert]);
  }
  if (total == 0) return kNaN;
  if (t.statistic_D[d] == kEntropy) return static_cast<double>(total * total) / static_cast<double>(squares);
  if (t.statistic_D[d] == kConcentration) {
    return static_cast<double>(most * t.num_experts_L[layer]) / static_cast<double>(total * t.top_k_L[layer]);
  }
  return divergence(t, t.baseline_D[d], layer, counts_E, total);
}

}  // namespace

void count_row(const DistributionRow& row) {
  row.tables->expert_bytes == 1 ? count<uint8_t>(row) : count<int16_t>(row);
}

void keep_row(const DistributionRow& row) {
  row.tables->expert_bytes == 1 ? keep<uint8_t>(row) : keep<int16_t>(row);
}

double distribution_value(const DistributionRow& row, int64_t d) {
  thread_local std::vector<int32_t> memory;
  const DistributionTables& t = *row.tables;
  const int64_t window = t.window_D[d], size = t.num_layers * t.max_experts;
  const int32_t* counts_LE;
  if (t.histogram_V[window] >= 0) {
    const int64_t at = row.slot * t.num_histograms + t.histogram_V[window];
    counts_LE = row.slots->histogram_SHLE + at * size;
  } else {
    memory.resize(static_cast<size_t>(size));
    counts_LE = memory.data();
    t.expert_bytes == 1 ? count_recent<uint8_t>(row, window, memory.data())
                        : count_recent<int16_t>(row, window, memory.data());
  }
  int64_t sum = 0, num_known = 0;
  double most = -std::numeric_limits<double>::infinity();
  for (int64_t layer = 0; layer < t.num_layers; ++layer) {
    const double value = of_layer(t, d, layer, counts_LE + layer * t.max_experts);
    if (std::isnan(value)) continue;
    ++num_known;
    sum += to_whole(value, kValueScale);
    most = std::max(most, value);
  }
  if (num_known == 0) return kNaN;
  if (t.takes_max_D[d]) return most;
  return static_cast<double>(sum) / kValueScale / static_cast<double>(num_known);
}

}  // namespace moe_guard
