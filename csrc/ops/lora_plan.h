// The rows and segments of a batch for the kernels of multi_lora_linear. For CUDA they are copied to the device in one
// piece, with the page lists. The host has all the data, so it need not wait for the device. A CUDA graph of such a
// call replays the batch of its capture.
#pragma once
#include <algorithm>
#include <vector>

#include "kernels/multi_lora_linear.h"
#include "ops/bind.h"

namespace peftops::ops {

#ifdef PEFTOPS_CUDA
class LoraPlan {
 public:
  // For factors of k and n columns in `pool`, if any; in segments of at most `piece` rows, if not 0.
  LoraPlan(const Tensor& like, const std::vector<int64_t>& order, const std::vector<LoraSegment>& segments,
           const LoraPool* pool, int64_t k, int64_t n, int64_t piece) {
    std::vector<LoraSegment> pieces;
    std::vector<int32_t> pages;
    std::vector<int64_t> first_page;   // of each piece, in `pages`
    for (const LoraSegment& s : segments) {
      const auto elements = [&](int64_t columns) { return s.r * ((columns + kLoraLine - 1) / kLoraLine * kLoraLine); };
      const int64_t at = int64_t(pages.size()), page = pool ? std::min(s.first, s.second) >> pool->page_shift : 0;
      if (pool) {   // pages before the first one of the factors are not read
        const int64_t end = std::max(s.first + elements(k), s.second + elements(n));
        pages.insert(pages.end(), s.pages + page, s.pages + ((end - 1) >> pool->page_shift) + 1);
      }
      for (int64_t begin = s.begin; begin < s.end; begin += piece ? piece : s.end - s.begin) {
        pieces.push_back(s);
        pieces.back().begin = begin;
        pieces.back().end = piece && begin + piece < s.end ? begin + piece : s.end;
        first_page.push_back(at - page);
      }
    }
    const int64_t rows_at = int64_t(pieces.size() * sizeof(LoraSegment));
    const int64_t pages_at = rows_at + int64_t(order.size() * sizeof(int64_t));
    const int64_t bytes = pages_at + int64_t(pages.size() * sizeof(int32_t));
    memory_ = empty(like, {bytes}, ScalarType::Byte);
    uint8_t* base = static_cast<uint8_t*>(memory_.mutable_data_ptr());
    for (size_t i = 0; i < pieces.size(); ++i)
      pieces[i].pages = reinterpret_cast<const int32_t*>(base + pages_at) + first_page[i];
    const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
    const int64_t shape[1] = {bytes};
    Tensor host = torch::stable::empty({shape, 1}, ScalarType::Byte, std::nullopt, cpu, like.is_cuda());   // pinned
    uint8_t* to = static_cast<uint8_t*>(host.mutable_data_ptr());
    std::copy_n(reinterpret_cast<const uint8_t*>(pieces.data()), rows_at, to);
    std::copy_n(reinterpret_cast<const uint8_t*>(order.data()), pages_at - rows_at, to + rows_at);
    std::copy_n(reinterpret_cast<const uint8_t*>(pages.data()), bytes - pages_at, to + pages_at);
    torch::stable::copy_(memory_, host, true);
    view_ = {reinterpret_cast<const int64_t*>(base + rows_at), reinterpret_cast<const LoraSegment*>(base),
             int64_t(pieces.size())};
  }
  LoraSegments view() const { return view_; }

 private:
  Tensor memory_;
  LoraSegments view_;
};
constexpr int64_t kPlannedPiece = kLoraPiece;
#else
class LoraPlan {
 public:
  LoraPlan(const Tensor&, const std::vector<int64_t>& order, const std::vector<LoraSegment>& segments, const LoraPool*,
           int64_t, int64_t, int64_t) : view_{order.data(), segments.data(), int64_t(segments.size())} {}
  LoraSegments view() const { return view_; }

 private:
  LoraSegments view_;
};
constexpr int64_t kPlannedPiece = 0;
#endif

}  // namespace peftops::ops
