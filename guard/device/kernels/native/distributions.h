// Conditions on how a window's selections are distributed over all experts, as
// `guard/device/distributions.py` computes them where nothing is speculated.

#pragma once

#include "judge.h"

namespace moe_guard {

// A row that is decided, and what its windows reach back to.
// evidence_TX: of the step; those of the request's rows from position `begin` on are its own
struct DistributionRow {
  const DistributionTables* tables;
  const Slots* slots;
  const int64_t* evidence_TX;
  int64_t num_evidence, slot, row, position, prompt, begin;
};

// Count the row in the request's histograms.
void count_row(const DistributionRow& row);

// What condition `d` compares, NaN where it is not known. All rows up to this one are counted, and none of
// the step's are kept.
double distribution_value(const DistributionRow& row, int64_t d);

// Keep the row's experts, for windows of later rows.
void keep_row(const DistributionRow& row);

}  // namespace moe_guard
