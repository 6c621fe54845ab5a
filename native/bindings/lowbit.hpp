// Python's objects for low-bit matrices. They keep their arrays, so that a call only passes what is new.
#pragma once

#include <utility>

#include "bindings/store.hpp"

namespace lamp::python {

using Vector = Array<float, 1>;

// A low-bit copy in blocks, of a matrix (rows, columns).
class BlockMatrix {
 public:
  BlockMatrix(std::string isa, Bytes codes, Halves scales, Vector errors, int bits, std::ptrdiff_t rows,
              std::ptrdiff_t columns)
      : kernels_(kernels(isa)), codes_(codes), scales_(scales), errors_(errors), rows_(rows), columns_(columns) {
    require(BlockFormats::has(bits), "no low-bit format in blocks has so many bits");
    require(rows >= 0 && columns >= 0, "a matrix has no negative size");
    blocks_.codes = codes.data();
    blocks_.scales = scales.data();
    blocks_.errors = errors.data();
    blocks_.bits = bits;
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
    p.matrix = blocks_;
    p.rows = rows_;
    p.columns = columns_;
    p.vectors = length(x.shape(0));
    p.x = x.data();
    p.y = y.data();
    p.threads = threads;
    const nb::gil_scoped_release release;
    kernels_.lowbit.products(p);
  }

  const Blocks& blocks() const { return blocks_; }
  std::ptrdiff_t rows() const { return rows_; }
  std::ptrdiff_t columns() const { return columns_; }

 private:
  const Kernels& kernels_;
  Bytes codes_;
  Halves scales_;
  Vector errors_;
  Blocks blocks_;
  std::ptrdiff_t rows_, columns_;
};

using Table = nb::ndarray<nb::ndim<2>, nb::device::cpu>;

// A full-precision matrix (rows, columns), float32, float16 or bfloat16.
inline Full full(const Table& x, std::ptrdiff_t rows, std::ptrdiff_t columns) {
  const auto type = x.dtype();
  const auto is = [&](nb::dlpack::dtype_code code, int bits) {
    return type.code == static_cast<std::uint8_t>(code) && type.bits == bits;
  };
  const bool half = is(nb::dlpack::dtype_code::Float, 16), brain = is(nb::dlpack::dtype_code::Bfloat, 16);
  require(half || brain || x.dtype() == nb::dtype<float>(), "a full copy must be float32, float16 or bfloat16");
  require(length(x.shape(0)) == rows && length(x.shape(1)) == columns && (rows == 0 || columns <= 1 || x.stride(1) == 1),
          "a full copy must have the shape of its low-bit copy and a contiguous last dimension");
  const FullType kind = half ? FullType::float16 : brain ? FullType::bfloat16 : FullType::float32;
  return {x.data(), kind, x.stride(0)};
}

// A gated MLP.
class Mlp {
 public:
  Mlp(std::string isa, const BlockMatrix& gate, const BlockMatrix& up, const BlockMatrix& down, Table gate_full,
      Table up_full, Table down_full, Vector down_norms, Vector down_errors, int activation)
      : kernels_(kernels(isa)), kept_{gate_full, up_full, down_full}, norms_(down_norms), errors_(down_errors) {
    require(activation == 0 || activation == 1, "unknown activation");
    call_.gate = gate.blocks();
    call_.up = up.blocks();
    call_.neurons = gate.rows();
    call_.columns = gate.columns();
    call_.outputs = length(down_full.shape(1));
    require(up.rows() == gate.rows() && up.columns() == gate.columns(), "gate and up must be of the same size");
    call_.gate_full = full(gate_full, call_.neurons, call_.columns);
    call_.up_full = full(up_full, call_.neurons, call_.columns);
    call_.down_full = full(down_full, call_.neurons, call_.outputs);
    call_.down = down.blocks();
    require(down.rows() == call_.outputs && down.columns() == call_.neurons, "down must map neurons to outputs");
    const std::ptrdiff_t padded = (call_.neurons + kPackRows - 1) / kPackRows * kPackRows;
    require(row_major(down_norms) && row_major(down_errors) && length(down_norms.size()) == padded &&
                length(down_errors.size()) == padded,
            "down's norms and errors must be contiguous, one for each neuron of a block");
    call_.down_norms = down_norms.data();
    call_.down_errors = down_errors.data();
    call_.activation = static_cast<Activation>(activation);
  }

  std::tuple<std::int64_t, std::int64_t> run(Floats<2> x, Array<float, 2> y, float up_threshold, float down_threshold,
                                             int threads) const {
    require(row_major(x) && length(x.shape(1)) == call_.columns, "x must be contiguous, of shape (vectors, columns)");
    require(row_major(y) && y.shape(0) == x.shape(0) && length(y.shape(1)) == call_.outputs,
            "y must be contiguous, of shape (vectors, outputs)");
    LowBitMlp p = call_;
    std::int64_t selected[2];
    p.vectors = length(x.shape(0));
    p.x = x.data();
    p.y = y.data();
    p.selected = selected;
    p.threads = threads;
    p.up_threshold = up_threshold;
    p.down_threshold = down_threshold;
    {
      const nb::gil_scoped_release release;
      kernels_.lowbit.mlp(p);
    }
    return {selected[0], selected[1]};
  }

  const LowBitMlp& call() const { return call_; }

 private:
  const Kernels& kernels_;
  Table kept_[3];
  Vector norms_, errors_;
  LowBitMlp call_;
};

}  // namespace lamp::python
