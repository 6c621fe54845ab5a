// The Python face of the low-bit kernels. Objects keep their matrices, so that a call only passes what is new.
#include <cmath>

#include "module.hpp"

namespace lamp::python {
namespace {

using Bytes = Array<std::uint8_t, 1>;
using Halves = Array<std::uint16_t, 1>;
using Vector = Array<float, 1>;

void require_bits(int bits, bool blocks) {
  require(bits == 4 || bits == 8 || (blocks && bits == 12), "bits must be 4, 8 or (in blocks only) 12");
}

// A low-bit copy in blocks, of a matrix (rows, columns).
class BlockMatrix {
 public:
  BlockMatrix(std::string isa, Bytes codes, Halves scales, Vector errors, int bits, std::ptrdiff_t rows,
              std::ptrdiff_t columns)
      : kernels_(kernels(isa)), codes_(codes), scales_(scales), errors_(errors), rows_(rows), columns_(columns) {
    require_bits(bits, true);
    require(rows >= 0 && columns >= 0, "a matrix has no negative size");
    blocks_.codes = codes.data(), blocks_.scales = scales.data(), blocks_.errors = errors.data(), blocks_.bits = bits;
    blocks_.groups = (columns + kPackGroup - 1) / kPackGroup;
    const std::ptrdiff_t count = (rows + kPackRows - 1) / kPackRows;
    require(row_major(codes) && row_major(scales) && row_major(errors) &&
                length(codes.size()) == count * blocks_.block_codes() &&
                length(scales.size()) == count * blocks_.block_scales() && length(errors.size()) == count * kPackRows,
            "codes, scales and errors must be contiguous and of the matrix's size");
  }

  void pack(Floats<2> x, int threads) {
    require(length(x.shape(0)) == rows_ && length(x.shape(1)) == columns_ && (columns_ <= 1 || x.stride(1) == 1),
            "x must have shape (rows, columns) and a contiguous last dimension");
    const Rows rows{x.data(), rows_, columns_, x.stride(0)};
    const nb::gil_scoped_release release;
    kernels_.lowbit.pack_blocks(blocks_, rows, threads);
  }

  void products(Floats<2> x, Array<float, 2> y, int threads) const {
    require(row_major(x) && length(x.shape(1)) == columns_, "x must be contiguous, of shape (vectors, columns)");
    require(row_major(y) && y.shape(0) == x.shape(0) && length(y.shape(1)) == rows_,
            "y must be contiguous, of shape (vectors, rows)");
    LowBitProducts p;
    p.matrix = blocks_, p.rows = rows_, p.columns = columns_, p.vectors = length(x.shape(0));
    p.x = x.data(), p.y = y.data(), p.threads = threads;
    const nb::gil_scoped_release release;
    kernels_.lowbit.products(p);
  }

 private:
  const Kernels& kernels_;
  Bytes codes_;
  Halves scales_;
  Vector errors_;
  Blocks blocks_;
  std::ptrdiff_t rows_, columns_;
};

void pack_lines(const std::string& isa, Floats<2> x, Bytes codes, Halves scales, int bits, int threads) {
  require_bits(bits, false);
  Lines lines{codes.data(), scales.data(), bits, (length(x.shape(1)) + kPackGroup - 1) / kPackGroup};
  const std::ptrdiff_t rows = length(x.shape(0));
  require(x.shape(1) <= 1 || x.stride(1) == 1, "x must have a contiguous last dimension");
  require(row_major(codes) && row_major(scales) && length(codes.size()) == rows * lines.groups * group_bytes(bits) &&
              length(scales.size()) == rows * lines.groups,
          "codes and scales must be contiguous and of the matrix's size");
  const Rows from{x.data(), rows, length(x.shape(1)), x.stride(0)};
  const Kernels& k = kernels(isa);
  const nb::gil_scoped_release release;
  k.lowbit.pack_lines(lines, from, threads);
}

}  // namespace

void bind_lowbit(nb::module_& m) {
  nb::class_<BlockMatrix>(m, "BlockMatrix")
      .def(nb::init<std::string, Bytes, Halves, Vector, int, std::ptrdiff_t, std::ptrdiff_t>(), "isa"_a, "codes"_a,
           "scales"_a, "errors"_a, "bits"_a, "rows"_a, "columns"_a)
      .def("pack", &BlockMatrix::pack, "x"_a, "threads"_a)
      .def("products", &BlockMatrix::products, "x"_a, "y"_a, "threads"_a);
  m.def("pack_lines", &pack_lines, "isa"_a, "x"_a, "codes"_a, "scales"_a, "bits"_a, "threads"_a);
}

}  // namespace lamp::python
