// The packed format: one layout for every dtype and every instruction set.
//
// Columns are cut into *strips* of 16, 8, 4, 2 or 1 (a block column of 12 is 8 + 4; no strip crosses a block column).
// A strip's values are *tiles* of 64 bytes: 16 units of 4 bytes, q = 16 / width rows of them. A unit is
//   float32: one weight;
//   int8:    four weights of one column, in four rows one after another, as dot-product instructions want them;
//   bfloat16: as float32, but two tiles zipped into one: the first in the low halves, the second in the high ones.
// The index holds the first row of each *run* of rows. If a block's height is a multiple of q, a run is the whole
// block; if not, each unit row is a run, and q of them share a tile. What fills a strip up to whole tiles is zero, with
// an index to rows behind the last one, which kernels see as zeros.
//
//   header | strips | index | scales, sums (int8) | values          each part begins at a multiple of 64 bytes
#ifndef KBS_FORMAT_H_
#define KBS_FORMAT_H_

#include <cstddef>
#include <cstdint>

namespace kbs {

constexpr uint32_t kMagic = 0x3153424bu;  // "KBS1"
constexpr uint32_t kFormatVersion = 1;
constexpr uint32_t kTile = 16;            // units in a tile
constexpr size_t kTileBytes = 64;
constexpr uint32_t kSlack = 64;           // rows of zeros that kernels may read behind the padded rows

struct Header {
  uint32_t magic, version, dtype, unit_rows;  // unit_rows: 4 for int8, else 1
  uint32_t rows, cols, gates, block_rows, block_cols;
  uint32_t padding_row;   // runs that only fill up point here
  uint32_t padded_rows;   // every run ends at or before this row
  uint32_t reserved;
  uint64_t blocks, elements;
  uint64_t strips, runs, tiles;  // counts; tiles of 64 bytes
  uint64_t strips_offset, index_offset, scales_offset, sums_offset, values_offset, bytes;
  uint64_t checksum;      // of the header (with this field 0), the strips and the index
};

struct Strip {
  uint32_t col, width;
  uint32_t run;           // unit rows in a run
  uint32_t runs;
  uint64_t first_run, first_tile;
};

// A validated buffer as kernels see it.
struct View {
  const Header* header;
  const Strip* strips;
  const int32_t* index;
  const float* scales;
  const int32_t* sums;    // of each column's int8 values
  const void* values;
};

}  // namespace kbs
#endif  // KBS_FORMAT_H_
