#include "stage/vision/preprocess/video_decode.h"

extern "C" {
#include <libavcodec/avcodec.h>
#include <libavformat/avformat.h>
}

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "stage/vision/preprocess/frame_to_rgb.h"

namespace qwen::preprocess {
namespace {

// Containers that hold everything in one file; playlists (hls, dash, concat, image2) would open other files.
constexpr char kFormats[] = "mov,mp4,matroska,webm,avi,mpegts,mpeg,ogg,flv,asf";
constexpr AVCodecID kCodecs[] = {AV_CODEC_ID_H264,       AV_CODEC_ID_HEVC,       AV_CODEC_ID_VP8,   AV_CODEC_ID_VP9,
                                 AV_CODEC_ID_AV1,        AV_CODEC_ID_MPEG4,      AV_CODEC_ID_MJPEG, AV_CODEC_ID_MPEG1VIDEO,
                                 AV_CODEC_ID_MPEG2VIDEO, AV_CODEC_ID_MSMPEG4V3,  AV_CODEC_ID_H263,  AV_CODEC_ID_THEORA,
                                 AV_CODEC_ID_FLV1,       AV_CODEC_ID_WMV2};
constexpr int kIoBufferBytes = 64 << 10;
constexpr double kDefaultFps = 24.0;  // the reference's, for a source that does not say

Status AvError(std::string_view what, int error) {
  char text[AV_ERROR_MAX_STRING_SIZE] = {};
  av_strerror(error, text, sizeof(text));
  return InvalidArgumentError(std::string(what) + ": " + text);
}

// What libav's read and seek callbacks see of the file.
struct MemoryFile {
  std::span<const std::byte> bytes;
  int64_t at = 0;
  static int Read(void* opaque, uint8_t* out, int size) {
    auto* file = static_cast<MemoryFile*>(opaque);
    const int64_t count = std::min<int64_t>(size, static_cast<int64_t>(file->bytes.size()) - file->at);
    if (count <= 0) return AVERROR_EOF;
    std::copy_n(reinterpret_cast<const uint8_t*>(file->bytes.data()) + file->at, count, out);
    file->at += count;
    return static_cast<int>(count);
  }
  static int64_t Seek(void* opaque, int64_t offset, int whence) {
    auto* file = static_cast<MemoryFile*>(opaque);
    const int64_t size = static_cast<int64_t>(file->bytes.size());
    whence &= ~AVSEEK_FORCE;
    if (whence == AVSEEK_SIZE) return size;
    const int64_t base = whence == SEEK_CUR ? file->at : whence == SEEK_END ? size : 0;
    if (whence != SEEK_SET && whence != SEEK_CUR && whence != SEEK_END) return AVERROR(EINVAL);
    if (offset < -base || offset > size - base) return AVERROR(EINVAL);
    return file->at = base + offset;
  }
};

struct FreeIo {
  void operator()(AVIOContext* io) const {
    av_freep(&io->buffer);
    avio_context_free(&io);
  }
};
struct CloseFormat {
  void operator()(AVFormatContext* format) const { avformat_close_input(&format); }
};
struct FreeCodec {
  void operator()(AVCodecContext* codec) const { avcodec_free_context(&codec); }
};
struct FreeFrame {
  void operator()(AVFrame* frame) const { av_frame_free(&frame); }
};
struct FreePacket {
  void operator()(AVPacket* packet) const { av_packet_free(&packet); }
};

// A demuxer over a file in memory, with its first video stream chosen.
class VideoFile {
 public:
  static Result<std::unique_ptr<VideoFile>> Open(std::span<const std::byte> bytes, const VideoLimits& limits) {
    static std::once_flag silenced;
    std::call_once(silenced, [] { av_log_set_level(AV_LOG_QUIET); });
    std::unique_ptr<VideoFile> video(new VideoFile(bytes));
    RETURN_IF_ERROR(video->OpenFormat(limits));
    return video;
  }

  // The next packet of the video stream; nullptr at the end.
  Result<AVPacket*> NextPacket() {
    while (true) {
      av_packet_unref(packet_.get());
      const int error = av_read_frame(format_.get(), packet_.get());
      if (error == AVERROR_EOF) return static_cast<AVPacket*>(nullptr);
      if (error < 0) return AvError("broken video", error);
      if (packet_->stream_index == stream_->index) return packet_.get();
    }
  }
  const AVStream& stream() const { return *stream_; }

 private:
  explicit VideoFile(std::span<const std::byte> bytes) : file_{bytes} {}

  Status OpenFormat(const VideoLimits& limits) {
    packet_.reset(av_packet_alloc());
    auto* buffer = static_cast<uint8_t*>(av_malloc(kIoBufferBytes));
    QP_CHECK(packet_ != nullptr && buffer != nullptr) << "out of memory";
    io_.reset(avio_alloc_context(buffer, kIoBufferBytes, 0, &file_, MemoryFile::Read, nullptr, MemoryFile::Seek));
    AVFormatContext* format = avformat_alloc_context();
    QP_CHECK(io_ != nullptr && format != nullptr) << "out of memory";
    format->pb = io_.get();
    format->io_open = [](AVFormatContext*, AVIOContext**, const char*, int, AVDictionary**) { return AVERROR(EACCES); };
    AVDictionary* options = nullptr;
    av_dict_set(&options, "format_whitelist", kFormats, 0);
    av_dict_set(&options, "max_streams", "64", 0);
    int error = avformat_open_input(&format, nullptr, nullptr, &options);  // frees `format` when it fails
    av_dict_free(&options);
    if (error < 0) return AvError("not a supported video file", error);
    format_.reset(format);

    // Probing decodes frames of its own: the same bound on their size holds for it.
    std::vector<AVDictionary*> stream_options(format->nb_streams, nullptr);
    for (AVDictionary*& dictionary : stream_options) {
      av_dict_set_int(&dictionary, "max_pixels", limits.max_frame_pixels, 0);
      av_dict_set_int(&dictionary, "threads", 1, 0);
    }
    error = avformat_find_stream_info(format, stream_options.empty() ? nullptr : stream_options.data());
    for (AVDictionary*& dictionary : stream_options) av_dict_free(&dictionary);
    if (error < 0) return AvError("broken video", error);
    for (unsigned i = 0; i < format->nb_streams && stream_ == nullptr; ++i) {
      const AVStream* stream = format->streams[i];
      const bool is_cover = (stream->disposition & AV_DISPOSITION_ATTACHED_PIC) != 0;
      if (stream->codecpar->codec_type == AVMEDIA_TYPE_VIDEO && !is_cover) stream_ = stream;
    }
    if (stream_ == nullptr) return InvalidArgumentError("the file has no video stream");
    for (unsigned i = 0; i < format->nb_streams; ++i) {
      if (format->streams[i] != stream_) format->streams[i]->discard = AVDISCARD_ALL;
    }
    if (std::find(std::begin(kCodecs), std::end(kCodecs), stream_->codecpar->codec_id) == std::end(kCodecs)) {
      return InvalidArgumentError(std::string("the video codec ") + avcodec_get_name(stream_->codecpar->codec_id) +
                                  " is not supported");
    }
    return OkStatus();
  }

  MemoryFile file_;
  std::unique_ptr<AVIOContext, FreeIo> io_;  // outlives format_, which uses it
  std::unique_ptr<AVFormatContext, CloseFormat> format_;
  std::unique_ptr<AVPacket, FreePacket> packet_;
  const AVStream* stream_ = nullptr;
};

struct SourceInfo {
  int64_t total_frames = 0;
  double fps = kDefaultFps;
};

// The frame count of the header (as PyAV's stream.frames); where a container has none (webm, mpegts), the packets that
// show a frame, counted in a pass over the file.
Result<int64_t> CountFrames(std::span<const std::byte> bytes, const VideoLimits& limits) {
  ASSIGN_OR_RETURN(auto video, VideoFile::Open(bytes, limits));
  if (video->stream().nb_frames > 0) return int64_t{video->stream().nb_frames};
  int64_t count = 0;
  while (true) {
    ASSIGN_OR_RETURN(const AVPacket* packet, video->NextPacket());
    if (packet == nullptr) return count;
    const bool is_hidden_vp8 = video->stream().codecpar->codec_id == AV_CODEC_ID_VP8 && packet->size > 0 &&
                               (packet->data[0] & 0x10) == 0;  // RFC 6386 9.1: show_frame
    if ((packet->flags & AV_PKT_FLAG_DISCARD) == 0 && !is_hidden_vp8) ++count;
  }
}

Status CheckLimits(const SourceInfo& info, int64_t width, int64_t height, const VideoLimits& limits) {
  const std::string size = std::to_string(width) + "x" + std::to_string(height);
  if (info.total_frames < 1) return InvalidArgumentError("the video has no frames");
  if (width < 1 || height < 1 || width * height > limits.max_frame_pixels) {
    return InvalidArgumentError("video frames of " + size + " are over the limit of " +
                                std::to_string(limits.max_frame_pixels) + " pixels");
  }
  if (info.total_frames > limits.max_source_frames) {
    return InvalidArgumentError("a video of " + std::to_string(info.total_frames) + " frames is over the limit of " +
                                std::to_string(limits.max_source_frames));
  }
  if (static_cast<double>(info.total_frames) / info.fps > limits.max_duration_s) {
    return InvalidArgumentError("the video is longer than " + std::to_string(static_cast<int64_t>(limits.max_duration_s)) +
                                " s");
  }
  if (info.total_frames * width * height > limits.max_decoded_pixels) {
    return InvalidArgumentError("a video of " + std::to_string(info.total_frames) + " frames of " + size +
                                " is over the limit of " + std::to_string(limits.max_decoded_pixels) + " pixels");
  }
  return OkStatus();
}

// Hands the frames numbered `indices` (ascending) to `sink`, in order; fewer when the file ends early.
Status DecodeFrames(std::span<const std::byte> bytes, std::span<const int64_t> indices, const VideoLimits& limits,
                    const std::function<Status(Image)>& sink) {
  ASSIGN_OR_RETURN(auto video, VideoFile::Open(bytes, limits));
  const AVCodecParameters* parameters = video->stream().codecpar;
  const AVCodec* decoder = avcodec_find_decoder(parameters->codec_id);
  if (decoder == nullptr) {
    return InvalidArgumentError(std::string("no decoder for ") + avcodec_get_name(parameters->codec_id));
  }
  const std::unique_ptr<AVCodecContext, FreeCodec> codec(avcodec_alloc_context3(decoder));
  const std::unique_ptr<AVFrame, FreeFrame> frame(av_frame_alloc());
  QP_CHECK(codec != nullptr && frame != nullptr) << "out of memory";
  int error = avcodec_parameters_to_context(codec.get(), parameters);
  codec->pkt_timebase = video->stream().time_base;
  codec->max_pixels = limits.max_frame_pixels;
  codec->thread_count = 1;
  if (error >= 0) error = avcodec_open2(codec.get(), decoder, nullptr);
  if (error < 0) return AvError("the video decoder does not start", error);

  FrameToRgb converter;
  int64_t number = 0;
  size_t next = 0;  // into indices
  int width = 0, height = 0;
  for (bool at_end = false; !at_end;) {
    ASSIGN_OR_RETURN(const AVPacket* packet, video->NextPacket());
    at_end = packet == nullptr;
    error = avcodec_send_packet(codec.get(), packet);  // nullptr drains the decoder
    if (error < 0 && error != AVERROR_EOF) return AvError("broken video", error);
    while ((error = avcodec_receive_frame(codec.get(), frame.get())) >= 0) {
      while (next < indices.size() && indices[next] < number) ++next;
      if (next == indices.size()) return OkStatus();
      if (indices[next] == number) {
        if (width == 0) {
          width = frame->width;
          height = frame->height;
        }
        if (frame->width != width || frame->height != height) {
          return InvalidArgumentError("the video changes its frame size");
        }
        ASSIGN_OR_RETURN(Image image, converter.Convert(*frame));
        RETURN_IF_ERROR(sink(std::move(image)));
      }
      ++number;
    }
    if (error != AVERROR(EAGAIN) && error != AVERROR_EOF) return AvError("broken video", error);
  }
  return OkStatus();
}

// Everything that is known before a frame is decoded for good.
struct Plan {
  SourceInfo info;
  int64_t width = 0, height = 0;
  std::vector<int64_t> indices;  // as sampled
  std::vector<int64_t> wanted;   // without repetitions
};
Result<Plan> MakePlan(std::span<const std::byte> bytes, const VideoProcessorConfig& config, const VideoLimits& limits) {
  if (static_cast<int64_t>(bytes.size()) > limits.max_bytes) {
    return InvalidArgumentError("a video file of " + std::to_string(bytes.size()) + " bytes is over the limit of " +
                                std::to_string(limits.max_bytes));
  }
  Plan plan;
  {
    ASSIGN_OR_RETURN(const auto video, VideoFile::Open(bytes, limits));
    const AVStream& stream = video->stream();
    plan.width = stream.codecpar->width;
    plan.height = stream.codecpar->height;
    for (const AVRational rate : {stream.r_frame_rate, stream.avg_frame_rate}) {  // the last valid one counts
      if (rate.num > 0 && rate.den > 0) plan.info.fps = static_cast<double>(rate.num) / rate.den;
    }
  }
  ASSIGN_OR_RETURN(plan.info.total_frames, CountFrames(bytes, limits));
  RETURN_IF_ERROR(CheckLimits(plan.info, plan.width, plan.height, limits));
  ASSIGN_OR_RETURN(plan.indices, SampleFrameIndices(plan.info.total_frames, plan.info.fps, config));
  plan.wanted = plan.indices;
  plan.wanted.erase(std::unique(plan.wanted.begin(), plan.wanted.end()), plan.wanted.end());
  return plan;
}

}  // namespace

Result<std::vector<int64_t>> SampleFrameIndices(int64_t total_frames, double fps, const VideoProcessorConfig& config) {
  if (total_frames < 1) return InvalidArgumentError("the video has no frames");
  if (!(fps > 0)) return InvalidArgumentError("the video's frame rate is not positive");
  int64_t count = config.num_frames;
  if (count == 0) {
    const double wanted = std::min(static_cast<double>(total_frames) / fps * config.fps, 1e9);
    count = std::min<int64_t>({std::max<int64_t>(static_cast<int64_t>(wanted), config.min_frames), config.max_frames,
                               total_frames});
  }
  // numpy.linspace(0, N - 1, count).round(): i * step, the last one set to the end exactly, ties to even.
  std::vector<int64_t> indices(count);
  const double step = count > 1 ? static_cast<double>(total_frames - 1) / static_cast<double>(count - 1) : 0.0;
  for (int64_t i = 0; i < count; ++i) indices[i] = static_cast<int64_t>(std::nearbyint(static_cast<double>(i) * step));
  if (count > 1) indices.back() = total_frames - 1;
  return indices;
}

Result<SampledVideo> DecodeVideo(std::span<const std::byte> bytes, const VideoProcessorConfig& config,
                                 const VideoLimits& limits) {
  ASSIGN_OR_RETURN(Plan plan, MakePlan(bytes, config, limits));
  if (static_cast<int64_t>(plan.wanted.size()) * plan.width * plan.height > limits.max_sampled_pixels) {
    return InvalidArgumentError("the sampled frames are over the limit of " + std::to_string(limits.max_sampled_pixels) +
                                " pixels");
  }
  SampledVideo video{.frames = {}, .indices = plan.indices, .fps = plan.info.fps, .total_frames = plan.info.total_frames};
  RETURN_IF_ERROR(DecodeFrames(bytes, plan.wanted, limits, [&video](Image frame) {
    video.frames.push_back(std::move(frame));
    return OkStatus();
  }));
  if (video.frames.empty()) return InvalidArgumentError("the video has no frames that decode");
  return video;
}

Result<VideoInput> MakeVideoInputFromFile(std::span<const std::byte> bytes, const VideoProcessorConfig& config,
                                          const VideoLimits& limits) {
  ASSIGN_OR_RETURN(Plan plan, MakePlan(bytes, config, limits));
  VideoProcessorConfig resized = config;  // for frames that have the right size already
  resized.do_resize = false;
  // The size depends on how many frames there are. A file that ends early is decoded a second time, for the true count.
  for (size_t expected = plan.wanted.size(); true;) {
    std::vector<Image> frames;
    std::optional<Size> size;
    RETURN_IF_ERROR(DecodeFrames(bytes, plan.wanted, limits, [&](Image frame) -> Status {
      if (!config.do_resize) {
        frames.push_back(std::move(frame));
        return OkStatus();
      }
      if (!size) {
        ASSIGN_OR_RETURN(size, VideoFrameSize(static_cast<int32_t>(expected), {frame.height, frame.width}, config));
      }
      frames.push_back(*size == Size{frame.height, frame.width} ? std::move(frame) : ResizeBicubic(frame, *size));
      return OkStatus();
    }));
    if (frames.empty()) return InvalidArgumentError("the video has no frames that decode");
    if (frames.size() == expected || !config.do_resize) {
      return MakeVideoInput(frames, plan.indices, plan.info.fps, resized);
    }
    QP_CHECK_LT(frames.size(), expected);
    expected = frames.size();
  }
}

}  // namespace qwen::preprocess
