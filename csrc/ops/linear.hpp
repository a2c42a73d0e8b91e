// Linear layers and the mixture of experts over all threads of the pool. Inputs and outputs are
// float32, row after row.
#pragma once

#include <memory>
#include <vector>

#include "../kernels.hpp"
#include "../memory.hpp"
#include "twelve.hpp"

namespace gptoss {

// A weight matrix as it is multiplied: as numbers, or as bytes.
struct Weight {
    Matrix stored;
    int planes = 0;       // of the activations it is multiplied with in integers; 0: floats
    Tiles tiles;          // of `stored`; empty for MXFP4, which is multiplied as it is
    Block<std::uint8_t> codes;
    Block<std::uint16_t> scales;
    TwelveBits twelve;
};

// Multiply in integers from now on, with activations of one byte or two (planes). MXFP4 stays as it
// is; numbers are rounded to bytes, a scale to each 32 columns of a row, and `stored` is read once.
void use_bytes(Weight& w, int planes);

// Keep bfloat16 in twelve bits from now on, where that is smaller: the same products, a quarter less
// to read. Whether it is done.
bool use_twelve(Weight& w);

// out [T, columns] = rows of a table of float32 or bfloat16, which may be a file that has not been read.
void gather(const Matrix& table, const std::int32_t* rows, i64 T, float* out);

// out [T, w.rows] = x [T, w.columns] @ w.T + bias; bias may be null
void linear(const float* x, i64 T, const Weight& w, const float* bias, float* out);

// All experts of a layer. Their matrices lie behind one another: [E, 2F, D] and [E, D, F].
struct ExpertWeights {
    const Weight &mlp1, &mlp2;  // rows: E * 2F and E * D
    const float *bias1, *bias2; // [E, 2F], [E, D]
    i64 E, D, F;
    float limit;
};

// out [T, D] = sum over the k chosen experts of share * expert(x); chosen, share: [T, k]
void experts(const float* x, i64 T, const ExpertWeights& w, const std::int32_t* chosen,
             const float* share, i64 k, float* out);

// The k best of a token's E scores, best first, of equal ones the first; and the softmax over just
// those, which is NaN where any score is.
void route(const float* scores, i64 E, i64 k, std::int32_t* chosen, float* share);

// Gives back what the operations keep between calls, except each thread's own.
void release_scratch();

}  // namespace gptoss
