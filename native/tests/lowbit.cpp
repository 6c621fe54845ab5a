// Holds the low-bit kernels against a scalar emulation: codes and scales byte for byte, products bit for bit.
//
// Memory has exactly the size that the kernels were promised, so that a sanitizer sees any step beyond it.
#include <algorithm>
#include <limits>

#include "tests/selftest.hpp"

namespace {

using selftest::check;
using selftest::same;

constexpr std::ptrdiff_t kBlock = lamp::kPackRows, kColumns = lamp::kPackGroup;
constexpr float kInfinity = std::numeric_limits<float>::infinity(), kNaN = std::numeric_limits<float>::quiet_NaN();

float bfloat(std::uint16_t pattern) { return std::bit_cast<float>(static_cast<std::uint32_t>(pattern) << 16); }

int nearest(float x, float scale, int largest) {
  const double q = static_cast<double>(x / scale), below = std::floor(q), rest = q - below;
  const bool up = rest > 0.5 || (rest == 0.5 && std::fmod(below, 2.0) != 0.0);
  return static_cast<int>(std::clamp(below + (up ? 1.0 : 0.0), -1.0 * largest, 1.0 * largest));
}

// One row's groups, by the definitions. Matrices have bfloat16 scales, `pattern`; vectors have float32 ones.
struct Group {
  int codes[kColumns] = {};
  std::uint16_t pattern = 0;
  float scale = 0.0f;
};

std::vector<Group> quantise(const float* x, std::ptrdiff_t columns, int largest, bool vector) {
  std::vector<Group> groups(static_cast<std::size_t>((columns + kColumns - 1) / kColumns));
  for (std::size_t g = 0; g < groups.size(); ++g) {
    const float* from = x + static_cast<std::ptrdiff_t>(g) * kColumns;
    const std::ptrdiff_t count = std::min(kColumns, columns - static_cast<std::ptrdiff_t>(g) * kColumns);
    bool finite = true;
    float top = 0.0f;
    for (std::ptrdiff_t i = 0; i < count; ++i) {
      finite = finite && std::isfinite(from[i]);
      top = std::max(top, std::fabs(from[i]));
    }
    Group& out = groups[g];
    float scale = top / static_cast<float>(largest);
    if (vector) {
      if (static_cast<double>(scale) * largest < top) scale = std::nextafter(scale, kInfinity);
      out.scale = finite ? scale : kNaN;
    } else {
      out.pattern = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(scale) >> 16);
      if (bfloat(out.pattern) < scale) ++out.pattern;
      if (!finite) out.pattern = 0x7fc0;
      out.scale = bfloat(out.pattern);
    }
    if (out.scale > 0.0f)
      for (std::ptrdiff_t i = 0; i < count; ++i) out.codes[i] = nearest(from[i], out.scale, largest);
  }
  return groups;
}

int signed_byte(std::uint8_t x) { return x < 128 ? x : x - 256; }

int code_in_block(const std::vector<std::uint8_t>& codes, int bits, std::ptrdiff_t groups, std::ptrdiff_t row,
                  std::ptrdiff_t column) {
  const std::ptrdiff_t lane = row % kBlock, half = column % 2;
  const auto at = [&](std::ptrdiff_t i) {
    return codes[static_cast<std::size_t>((row / kBlock * groups * kColumns / 2 + column / 2) * kBlock * bits / 4 + i)];
  };
  const auto nibble = [&](std::ptrdiff_t i) { return half ? at(i) >> 4 : at(i) & 15; };
  if (bits == 4) return nibble(lane) - 8;
  const int high = signed_byte(at(2 * lane + half));
  return bits == 8 ? high : high * 16 + nibble(2 * kBlock + lane);
}

// The values of one key head of a store, appended in two parts.
struct PairedRows {
  std::vector<std::uint8_t> codes, key_codes;
  std::vector<std::uint16_t> scales, key_scales;
  std::vector<float> full, keys, key_errors;
  int bits;
  std::ptrdiff_t rows, groups;

  PairedRows(int bits_, std::ptrdiff_t rows_, std::ptrdiff_t groups_)
      : codes(static_cast<std::size_t>(rows_ * groups_ * kColumns * bits_ / 8)),
        key_codes(static_cast<std::size_t>(rows_ * kColumns)), scales(static_cast<std::size_t>(rows_ * groups_)),
        key_scales(static_cast<std::size_t>(rows_)), full(static_cast<std::size_t>(rows_ * groups_ * kColumns)),
        keys(static_cast<std::size_t>(rows_)), key_errors(keys), bits(bits_), rows(rows_), groups(groups_) {}

  void append(const lamp::Kernels& kernels, const lamp::Rows& from, int threads) {
    lamp::Append p;
    lamp::KeyValues& store = p.store;
    store.batches = store.heads = store.size = 1;
    store.value_size = from.columns;
    store.capacity = rows;
    store.keys = {key_codes.data(), key_scales.data(), key_errors.data(), 8, 1};
    store.values = {codes.data(), scales.data(), bits, groups};
    store.full_keys = {keys.data(), lamp::FullType::float32, 1};
    store.full_values = {full.data(), lamp::FullType::float32, from.columns};
    p.k = keys.data();
    p.k_row = 0;
    p.v_row = from.row;
    p.threads = threads;
    for (const std::ptrdiff_t end : {from.count / 2, from.count}) {
      p.v = from.at(p.start);
      p.count = end - p.start;
      kernels.decode.append(p);
      p.start = end;
    }
  }
  int code(std::ptrdiff_t row, std::ptrdiff_t column) const {
    const std::ptrdiff_t at = row / 2 * groups * kColumns + column;
    if (bits == 8) return signed_byte(codes[static_cast<std::size_t>(2 * at + row % 2)]);
    const std::uint8_t byte = codes[static_cast<std::size_t>(at)];
    return (row % 2 ? byte >> 4 : byte & 15) - 8;
  }
};

float draw(std::mt19937& random, int kind) {
  std::normal_distribution<float> gauss;
  const float x = gauss(random);
  switch (kind) {
    case 1: return x * 1e-39f;
    case 2: return std::clamp(x, -3.0f, 3.0f) * 1.1e38f;
    case 3: return random() % 4 ? 0.0f : x;
    case 4: {
      constexpr float kOdd[] = {kInfinity, kNaN, -0.0f, 1e-45f};
      return random() % 50 ? x : kOdd[random() % 4];
    }
    default: return x;
  }
}

void test_one(const lamp::Kernels& kernels, std::mt19937& random, int bits, int kind) {
  const auto upto = [&](unsigned n) { return static_cast<std::ptrdiff_t>(random() % (n + 1)); };
  const std::ptrdiff_t rows = upto(70), columns = upto(random() % 4 ? 140 : 600), stride = columns + upto(3);
  const std::ptrdiff_t vectors = random() % 25 ? upto(9) : 120 + upto(20);
  const std::ptrdiff_t groups = (columns + kColumns - 1) / kColumns, padded = (rows + kBlock - 1) / kBlock * kBlock;
  const auto size = [](std::ptrdiff_t n) { return static_cast<std::size_t>(n); };
  std::vector<float> weight(size(rows ? (rows - 1) * stride + columns : 0)), x(size(vectors * columns));
  for (float& w : weight) w = draw(random, kind);
  for (float& v : x) v = draw(random, kind == 1 || kind == 2 ? 0 : kind);
  std::vector<std::uint8_t> codes(size(padded * groups * kColumns * bits / 8));
  std::vector<std::uint16_t> scales(size(padded * groups));
  std::vector<float> errors(size(padded), -1.0f), y(size(vectors * rows), 7.0f);
  lamp::LowBitProducts p;
  p.matrix = {codes.data(), scales.data(), errors.data(), bits, groups};
  p.rows = rows;
  p.columns = columns;
  p.vectors = vectors;
  p.x = x.data();
  p.y = y.data();
  p.threads = static_cast<int>(1 + random() % 3);
  const lamp::Rows from{weight.data(), rows, columns, stride};
  kernels.lowbit.pack_blocks(p.matrix, from, p.threads);
  kernels.lowbit.products(p);

  PairedRows values(bits == 12 ? 8 : bits, padded, groups);
  values.append(kernels, from, p.threads);

  std::vector<std::vector<Group>> own;
  for (std::ptrdiff_t v = 0; v < vectors; ++v) own.push_back(quantise(x.data() + v * columns, columns, 32767, true));
  bool packed = true, paired = true, bounded = true, multiplied = true;
  for (std::ptrdiff_t r = 0; r < rows; ++r) {
    const float* row = columns ? weight.data() + r * stride : nullptr;
    const std::vector<Group> want = quantise(row, columns, lamp::BlockFormats::largest(bits), false);
    long double squares = 0.0L;
    for (std::ptrdiff_t k = 0; k < groups * kColumns; ++k) {
      const Group& group = want[size(k / kColumns)];
      const int code = group.codes[k % kColumns];
      const auto at = size((r / kBlock * groups + k / kColumns) * kBlock + r % kBlock);
      packed = packed && code == code_in_block(codes, bits, groups, r, k) && scales[at] == group.pattern;
      if (bits != 12)
        paired = paired && code == values.code(r, k) && values.scales[at] == group.pattern;
      const long double left = k < columns ? row[k] - static_cast<long double>(group.scale) * code : 0.0L;
      squares += left * left;
    }
    const long double norm = std::sqrt(squares), noted = errors[size(r)];
    const bool finite = std::isfinite(static_cast<double>(norm));
    bounded = bounded && (finite ? noted >= norm && noted <= norm * 1.000002L + 0x1p-149L : !(noted <= 3.5e38L));
    for (std::ptrdiff_t v = 0; v < vectors; ++v) {
      float sum = 0.0f;
      for (std::size_t g = 0; g < want.size(); ++g) {
        std::int64_t integers = 0;
        for (std::ptrdiff_t i = 0; i < kColumns; ++i) integers += want[g].codes[i] * own[size(v)][g].codes[i];
        sum = std::fma(static_cast<float>(integers), want[g].scale * own[size(v)][g].scale, sum);
      }
      multiplied = multiplied && same(sum, y[size(v * rows + r)]);
    }
  }
  for (std::ptrdiff_t r = rows; r < padded; ++r) bounded = bounded && errors[size(r)] == -1.0f;  // not theirs to write
  const std::string which = std::string(" ") + kernels.name + " bits=" + std::to_string(bits) + " " +
                            std::to_string(rows) + "x" + std::to_string(columns) + " data=" + std::to_string(kind);
  check(packed, "pack_blocks" + which);
  check(paired, "values appended" + which);
  check(bounded, "errors" + which);
  check(multiplied, "low-bit products" + which);
}

// Every product as large as it can be, with equal signs: the sums of a group just fit 32 bits.
void test_largest(const lamp::Kernels& kernels) {
  for (const int bits : {4, 8, 12}) {
    const std::vector<float> weight(kColumns, -3.0f), x(kColumns, -5.0f);
    std::vector<std::uint8_t> codes(static_cast<std::size_t>(kBlock * kColumns * bits / 8));
    std::vector<std::uint16_t> scales(kBlock);
    std::vector<float> errors(kBlock);
    float y = 0.0f;
    lamp::LowBitProducts p;
    p.matrix = {codes.data(), scales.data(), errors.data(), bits, 1};
    p.rows = 1;
    p.columns = kColumns;
    p.vectors = 1;
    p.x = x.data();
    p.y = &y;
    kernels.lowbit.pack_blocks(p.matrix, {weight.data(), 1, kColumns, kColumns}, 1);
    kernels.lowbit.products(p);
    check(std::fabs(y - 480.0f) < 480.0f / 128, std::string("largest sums ") + kernels.name + std::to_string(bits));
  }
}

}  // namespace

void selftest::test_lowbit(const lamp::Kernels& kernels, std::mt19937& random) {
  for (const int bits : {4, 8, 12})
    for (int kind = 0; kind < 5; ++kind)
      for (int i = 0; i < 20; ++i) test_one(kernels, random, bits, kind);
  test_largest(kernels);
}
