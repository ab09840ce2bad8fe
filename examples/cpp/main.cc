// What to label next, asked in C++: messages, a stream, what an error tells, stored requests sent again.
//
//   select [HOST:PORT [REQUEST.binpb ...]]
#include <google/rpc/error_details.pb.h>
#include <google/rpc/status.pb.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/support/error_details.h>
#include <zlib.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <future>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "queryselect/v1/selection.grpc.pb.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "tensors travel little-endian");

using namespace queryselect::v1;
using Stub = SelectionService::Stub;
using Stream = grpc::ClientReaderWriter<SelectStreamRequest, SelectStreamResponse>;

// A name with several addresses is several servers: each call goes to the next of those that are ready.
constexpr char kServiceConfig[] = R"({
  "loadBalancingConfig": [{"round_robin": {}}],
  "healthCheckConfig": {"serviceName": "queryselect.v1.SelectionService"}
})";
constexpr int kAnswerBytes = 256 << 20;  // gRPC's own 4 MiB is less than the ids of a million picks
constexpr int64_t kRows = 1000, kDimensions = 8, kClasses = 4;

// A deadline, whose end stops the kernel too.
std::unique_ptr<grpc::ClientContext> Minute() {
  auto context = std::make_unique<grpc::ClientContext>();
  context->set_deadline(std::chrono::system_clock::now() + std::chrono::minutes(1));
  return context;
}

// A tensor of values, row after row.
template <typename Number>
Tensor MakeTensor(DataType dtype, const std::vector<Number>& values, const std::vector<int64_t>& shape) {
  Tensor tensor;
  tensor.set_dtype(dtype);
  tensor.mutable_shape()->Assign(shape.begin(), shape.end());
  tensor.set_data(values.data(), values.size() * sizeof(Number));
  return tensor;
}

// The elements of a tensor of an answer.
template <typename Number>
std::vector<Number> Elements(const Tensor& tensor) {
  std::vector<Number> values(tensor.data().size() / sizeof(Number));
  std::memcpy(values.data(), tensor.data().data(), tensor.data().size());
  return values;
}

// Numbers from -1 to 1 that look drawn and are computed.
std::vector<float> Numbers(int64_t count, int64_t factor) {
  std::vector<float> values(count);
  for (int64_t at = 0; at < count; ++at) values[at] = static_cast<float>(at * factor % 1000003 / 500001.5 - 1);
  return values;
}

// The picks of an answer, in the order of choice.
void Show(const std::string& name, const SelectResponse& answer) {
  const auto rows = Elements<int64_t>(answer.indices());
  const auto scores = Elements<double>(answer.scores());
  std::printf("%s [", name.c_str());
  for (size_t at = 0; at < rows.size(); ++at) {
    std::printf("%s{\"row\":%lld,\"score\":%.17g}", at ? "," : "", static_cast<long long>(rows[at]), scores[at]);
  }
  std::printf("]\n");
}

// What a failed call says to programs: code, reason, field, and when to come back.
void Tell(const grpc::Status& status) {
  std::printf("code %d\n", status.error_code());
  google::rpc::Status details;
  if (!grpc::ExtractErrorDetails(status, &details).ok()) return;
  for (const auto& detail : details.details()) {
    google::rpc::ErrorInfo info;
    google::rpc::BadRequest wrong;
    google::rpc::RetryInfo retry;
    if (detail.UnpackTo(&info)) {
      std::printf("reason %s\n", info.reason().c_str());
    } else if (detail.UnpackTo(&wrong)) {
      for (const auto& violation : wrong.field_violations()) std::printf("field %s\n", violation.field().c_str());
    } else if (detail.UnpackTo(&retry)) {
      std::printf("again after %s\n", retry.retry_delay().ShortDebugString().c_str());
    }
  }
}

void Require(const grpc::Status& status) {
  if (status.ok()) return;
  std::cerr << status.error_message() << "\n";
  std::exit(1);
}

SelectResponse Select(Stub& stub, const SelectRequest& request) {
  SelectResponse answer;
  Require(stub.Select(Minute().get(), request, &answer));
  return answer;
}

// Sends a tensor in chunks, and says that this was all.
void Send(Stream& stream, const std::string& path, const std::string& data, int64_t recommended) {
  const size_t size = recommended > 0 ? recommended : 1 << 20;
  SelectStreamRequest message;
  for (size_t offset = 0; offset < data.size(); offset += size) {
    Chunk& chunk = *message.mutable_chunk();
    chunk.set_path(path);
    chunk.set_offset(offset);
    chunk.set_data(data.substr(offset, size));
    chunk.set_crc32(crc32(0, reinterpret_cast<const Bytef*>(chunk.data().data()), chunk.data().size()));
    if (!stream.Write(message)) return;  // the stream has ended, and Finish tells why
  }
  stream.WritesDone();
}

// The same request, whose logits come in chunks, once the server says that they may.
SelectResponse SelectStreamed(Stub& stub, const SelectRequest& request) {
  SelectStreamRequest message;
  *message.mutable_start() = request;
  message.mutable_start()->mutable_pool()->mutable_logits()->mutable_streamed();

  const auto context = Minute();
  const auto stream = stub.SelectStream(context.get());
  stream->Write(message);  // where it fails, Read does too, and Finish tells why
  std::future<void> sent;
  SelectResponse answer;
  SelectStreamResponse response;
  while (stream->Read(&response)) {
    if (response.has_admitted()) {
      // Beside reading, since the server tells progress meanwhile.
      sent = std::async(std::launch::async, Send, std::ref(*stream), "pool.logits",
                        std::cref(request.pool().logits().data()), response.admitted().recommended_chunk_bytes());
    } else if (response.has_result()) {
      answer = response.result();  // five picks: tensors over 1 MiB would be marked as streamed and follow in chunks
    }
  }
  if (sent.valid()) sent.wait();
  Require(stream->Finish());
  if (!answer.has_indices()) Require({grpc::StatusCode::DATA_LOSS, "the stream ended before its answer"});
  return answer;
}

SelectRequest Request(const Pool& pool) {
  SelectRequest request;
  *request.mutable_pool() = pool;
  request.mutable_stop()->set_max_items(5);
  return request;
}

int main(int argc, char** argv) {
  const std::string target = argc > 1 ? argv[1] : "localhost:50051";
  grpc::ChannelArguments options;
  options.SetServiceConfigJSON(kServiceConfig);
  options.SetMaxReceiveMessageSize(kAnswerBytes);
  // With TLS: grpc::SslCredentials({.pem_root_certs = …}).
  const auto channel = grpc::CreateCustomChannel("dns:///" + target, grpc::InsecureChannelCredentials(), options);
  const auto stub = SelectionService::NewStub(channel);

  for (int at = 2; at < argc; ++at) {
    std::ifstream file(argv[at], std::ios::binary);
    SelectRequest request;
    if (!request.ParseFromIstream(&file)) return std::cerr << argv[at] << " is no request\n", 1;
    const std::string path = argv[at];
    Show(path.substr(path.rfind('/') + 1), Select(*stub, request));
  }
  if (argc > 2) return 0;

  const Tensor embeddings = MakeTensor(DATA_TYPE_F32, Numbers(kRows * kDimensions, 7919), {kRows, kDimensions});
  const Tensor logits = MakeTensor(DATA_TYPE_F32, Numbers(kRows * kClasses, 104729), {kRows, kClasses});
  Pool pool;
  *pool.mutable_labeled() = MakeTensor<int64_t>(DATA_TYPE_I64, {0, 1, 2}, {3});

  *pool.mutable_logits() = logits;
  SelectRequest margin = Request(pool);
  margin.mutable_strategy()->mutable_margin();
  Show("margin", Select(*stub, margin));

  *pool.mutable_embeddings() = embeddings;
  SelectRequest bait = Request(pool);
  auto& parameters = *bait.mutable_strategy()->mutable_bait();
  parameters.set_ridge(0.5);
  parameters.set_fisher_scale(queryselect::strategies::v1::FISHER_SCALE_SUM);
  parameters.set_top_classes(2);

  pool.clear_logits();
  SelectRequest far = Request(pool);
  far.mutable_strategy()->mutable_k_center_greedy()->set_normalize(true);
  Show("k_center_greedy", Select(*stub, far));
  Show("bait", Select(*stub, bait));

  Show("stream", SelectStreamed(*stub, margin));

  far.mutable_pool()->clear_embeddings();
  SelectResponse nothing;
  Tell(stub->Select(Minute().get(), far, &nothing));
}
