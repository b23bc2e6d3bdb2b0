"""Where things are in the flattened tables that the judge's kernels read.

`HEAD_*` are places in the table of whole numbers, each with a size or with where a family of arrays
begins. The other names number the arrays within their family, which are equally long: C conditions,
R rules, A mask actions, X signals.
"""

from triton.language import constexpr

HEAD_SIGNALS = constexpr(0)  # X
HEAD_EVIDENCE = constexpr(1)  # columns of the evidence
HEAD_CONDITIONS = constexpr(2)  # C
HEAD_NODES = constexpr(3)  # of all expressions
HEAD_LEVELS = constexpr(4)
HEAD_WIDTH = constexpr(5)  # the most children of a node
HEAD_RULES = constexpr(6)  # R
HEAD_RULE_CONDITIONS = constexpr(7)  # the most of a rule
HEAD_ACTIONS = constexpr(8)  # A
HEAD_SETS = constexpr(9)  # N
HEAD_WINDOW = constexpr(10)  # recent sums that a slot keeps, or 1
HEAD_PERSISTENCE = constexpr(11)  # recent hits that a slot keeps, or 1
HEAD_OF_SIGNALS = constexpr(12)
HEAD_OF_CONDITIONS = constexpr(13)
HEAD_OF_NODES = constexpr(14)
HEAD_OF_LEVELS = constexpr(15)
HEAD_OF_RULES = constexpr(16)
HEAD_OF_RULE_CONDITIONS = constexpr(17)
HEAD_OF_ACTIONS = constexpr(18)
HEAD_OF_SETS = constexpr(19)
HEAD_SIZE = constexpr(20)

SIGNAL_SOURCE = constexpr(0)  # column of the evidence
SIGNAL_TOKENS = constexpr(1)  # column of the token signal
SIGNAL_LEAST = constexpr(2)  # of an indicator, else -1

# A condition's three readings, each in four arrays; no mass has the signal -1.
NUMERATOR = constexpr(0)
TOKENS = constexpr(4)
MASS = constexpr(8)
READING_SIGNAL = constexpr(0)
READING_WINDOW = constexpr(1)
READING_TOKENS = constexpr(2)
READING_IN_OUTPUT = constexpr(3)
CONDITION_MIN_TOKENS = constexpr(12)
CONDITION_TRANSFORM = constexpr(13)
CONDITION_STRICT = constexpr(14)
CONDITION_ALWAYS = constexpr(15)
CONDITION_RULE = constexpr(16)

# Of float64.
CONDITION_OFFSET = constexpr(0)
CONDITION_PER_TOKEN = constexpr(1)
CONDITION_CONSTANT = constexpr(2)
CONDITION_BIAS = constexpr(3)
CONDITION_HIGHEST_MET = constexpr(4)
CONDITION_LOWEST_MET = constexpr(5)
CONDITION_SIGN = constexpr(6)

RULE_ROOT = constexpr(0)  # 2 · column + negated, as each child of a node
RULE_IN_PROMPT = constexpr(1)
RULE_IN_OUTPUT = constexpr(2)
RULE_HITS = constexpr(3)
RULE_OF = constexpr(4)
RULE_BLOCKS = constexpr(5)
RULE_ACTS = constexpr(6)
RULE_OLDEST_TOKENS = constexpr(7)
RULE_NEWEST_TOKENS = constexpr(8)

ACTION_RULE = constexpr(0)
ACTION_DYNAMIC = constexpr(1)
ACTION_CLEARS = constexpr(2)
ACTION_TOKENS = constexpr(3)
