// What to label next, asked in Go: messages, a stream, what an error tells, stored requests sent again.
//
//	select [HOST:PORT [REQUEST.binpb ...]]
package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"io"
	"log"
	"math"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	_ "google.golang.org/grpc/health" // looks after servers' health, where the service config says so
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	strategies "github.com/queryselect/queryselect/proto/queryselect/strategies/v1"
	queryselect "github.com/queryselect/queryselect/proto/queryselect/v1"
)

// A name with several addresses is several servers: each call goes to the next of those that are ready.
const serviceConfig = `{
  "loadBalancingConfig": [{"round_robin": {}}],
  "healthCheckConfig": {"serviceName": "queryselect.v1.SelectionService"}
}`

const (
	answerBytes = 256 << 20 // gRPC's own 4 MiB is less than the ids of a million picks
	rows        = 1000
	dimensions  = 8
	classes     = 4
)

func main() {
	target := "localhost:50051"
	if len(os.Args) > 1 {
		target = os.Args[1]
	}
	connection, err := grpc.Dial("dns:///"+target,
		grpc.WithInsecure(), // with TLS: grpc.WithTransportCredentials(credentials.NewClientTLSFromFile("ca.crt", ""))
		grpc.WithDefaultServiceConfig(serviceConfig),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(answerBytes)))
	if err != nil {
		log.Fatal(err)
	}
	defer connection.Close()
	client := queryselect.NewSelectionServiceClient(connection)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute) // its end stops the kernel too
	defer cancel()

	if len(os.Args) > 2 {
		for _, path := range os.Args[2:] {
			show(filepath.Base(path), must(client.Select(ctx, stored(path))))
		}
		return
	}
	embeddings := float32s(numbers(rows*dimensions, 7919), rows, dimensions)
	logits := float32s(numbers(rows*classes, 104729), rows, classes)
	labeled := int64s(0, 1, 2)

	margin := request(&queryselect.Pool{Logits: logits, Labeled: labeled},
		&queryselect.Strategy{Kind: &queryselect.Strategy_Margin{Margin: &strategies.Margin{}}})
	show("margin", must(client.Select(ctx, margin)))

	far := request(&queryselect.Pool{Embeddings: embeddings, Labeled: labeled},
		&queryselect.Strategy{Kind: &queryselect.Strategy_KCenterGreedy{
			KCenterGreedy: &strategies.KCenterGreedy{Normalize: proto.Bool(true)}}})
	show("k_center_greedy", must(client.Select(ctx, far)))

	bait := request(&queryselect.Pool{Embeddings: embeddings, Logits: logits, Labeled: labeled},
		&queryselect.Strategy{Kind: &queryselect.Strategy_Bait{Bait: &strategies.Bait{
			Ridge:       proto.Float64(0.5),
			FisherScale: strategies.FisherScale_FISHER_SCALE_SUM.Enum(),
			TopClasses:  proto.Int32(2)}}})
	show("bait", must(client.Select(ctx, bait)))

	answer, err := streamed(ctx, client, margin)
	show("stream", must(answer, err))

	_, err = client.Select(ctx, request(&queryselect.Pool{Logits: logits}, far.Strategy))
	tell(err)
}

func request(pool *queryselect.Pool, strategy *queryselect.Strategy) *queryselect.SelectRequest {
	return &queryselect.SelectRequest{
		Pool:     pool,
		Strategy: strategy,
		Stop:     &queryselect.Stop{MaxItems: proto.Int64(5)},
	}
}

// stored reads a request that was written as bytes.
func stored(path string) *queryselect.SelectRequest {
	data, err := os.ReadFile(path)
	if err != nil {
		log.Fatal(err)
	}
	request := &queryselect.SelectRequest{}
	if err := proto.Unmarshal(data, request); err != nil {
		log.Fatal(err)
	}
	return request
}

// streamed sends a request whose logits come in chunks, once the server says that they may.
func streamed(ctx context.Context, client queryselect.SelectionServiceClient,
	request *queryselect.SelectRequest) (*queryselect.SelectResponse, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // lets go of the stream, and of what still sends, however this ends
	start := proto.Clone(request).(*queryselect.SelectRequest)
	start.Pool.Logits.Source = &queryselect.Tensor_Streamed{Streamed: &queryselect.Streamed{}}
	stream, err := client.SelectStream(ctx)
	if err != nil {
		return nil, err
	}
	first := &queryselect.SelectStreamRequest{Message: &queryselect.SelectStreamRequest_Start{Start: start}}
	if err := stream.Send(first); err != nil && err != io.EOF { // io.EOF: the stream has ended, and Recv tells why
		return nil, err
	}
	var answer *queryselect.SelectResponse
	for {
		message, err := stream.Recv()
		if err == io.EOF && answer != nil {
			return answer, nil
		}
		if err != nil {
			return nil, err // io.EOF: the stream ended before its answer
		}
		switch kind := message.Message.(type) {
		case *queryselect.SelectStreamResponse_Admitted:
			size := int(kind.Admitted.GetRecommendedChunkBytes())
			// Beside reading, since the server tells progress meanwhile.
			go send(stream, "pool.logits", request.Pool.Logits.GetData(), size)
		case *queryselect.SelectStreamResponse_Result:
			answer = kind.Result // five picks: tensors over 1 MiB would be marked as streamed and follow in chunks
		}
	}
}

func send(stream queryselect.SelectionService_SelectStreamClient, path string, data []byte, size int) {
	if size <= 0 {
		size = 1 << 20
	}
	for offset := 0; offset < len(data); offset += size {
		end := offset + size
		if end > len(data) {
			end = len(data)
		}
		chunk := &queryselect.Chunk{
			Path:   proto.String(path),
			Offset: proto.Int64(int64(offset)),
			Data:   data[offset:end],
			Crc32:  proto.Uint32(crc32.ChecksumIEEE(data[offset:end])),
		}
		message := &queryselect.SelectStreamRequest{Message: &queryselect.SelectStreamRequest_Chunk{Chunk: chunk}}
		if stream.Send(message) != nil {
			return // the stream has ended, and Recv tells why
		}
	}
	stream.CloseSend()
}

// numbers are from -1 to 1, look drawn and are computed.
func numbers(count int, factor int64) []float32 {
	values := make([]float32, count)
	for at := range values {
		values[at] = float32(float64(int64(at)*factor%1000003)/500001.5 - 1)
	}
	return values
}

// float32s is a tensor of values, row after row.
func float32s(values []float32, shape ...int64) *queryselect.Tensor {
	data := make([]byte, 4*len(values))
	for at, value := range values {
		binary.LittleEndian.PutUint32(data[4*at:], math.Float32bits(value))
	}
	return &queryselect.Tensor{
		Dtype:  queryselect.DataType_DATA_TYPE_F32.Enum(),
		Shape:  shape,
		Source: &queryselect.Tensor_Data{Data: data},
	}
}

// int64s is a list of rows.
func int64s(values ...int64) *queryselect.Tensor {
	data := make([]byte, 8*len(values))
	for at, value := range values {
		binary.LittleEndian.PutUint64(data[8*at:], uint64(value))
	}
	return &queryselect.Tensor{
		Dtype:  queryselect.DataType_DATA_TYPE_I64.Enum(),
		Shape:  []int64{int64(len(values))},
		Source: &queryselect.Tensor_Data{Data: data},
	}
}

type pick struct {
	Row   int64   `json:"row"`
	Score float64 `json:"score"`
}

// show prints the picks of an answer, in the order of choice.
func show(name string, answer *queryselect.SelectResponse) {
	indices, scores := answer.Indices.GetData(), answer.Scores.GetData()
	picks := make([]pick, len(indices)/8)
	for at := range picks {
		picks[at].Row = int64(binary.LittleEndian.Uint64(indices[8*at:]))
		picks[at].Score = math.Float64frombits(binary.LittleEndian.Uint64(scores[8*at:]))
	}
	text, err := json.Marshal(picks)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(name, string(text))
}

// tell prints what a failed call says to programs: code, reason, field, and when to come back.
func tell(err error) {
	failed := status.Convert(err)
	fmt.Println("code", failed.Code())
	for _, detail := range failed.Details() {
		switch kind := detail.(type) {
		case *errdetails.ErrorInfo:
			fmt.Println("reason", kind.Reason)
		case *errdetails.BadRequest:
			for _, violation := range kind.FieldViolations {
				fmt.Println("field", violation.Field)
			}
		case *errdetails.RetryInfo:
			fmt.Println("again after", kind.RetryDelay)
		}
	}
}

func must(answer *queryselect.SelectResponse, err error) *queryselect.SelectResponse {
	if err != nil {
		log.Fatal(err)
	}
	return answer
}
