// Sends the bytes in proto/testdata as they are, and compares what comes back. node replay.js [HOST:PORT]
import { readFileSync } from 'node:fs';
import grpc from '@grpc/grpc-js';
import { QuerySelectError } from './errors.js';
import { definition } from './protos.js';
import { picks } from './tensors.js';

const read = (name) => readFileSync(new URL(`../../proto/testdata/${name}`, import.meta.url));
const client = new grpc.Client(process.argv[2] ?? 'localhost:50051', grpc.credentials.createInsecure());
const method = (rpc) => definition['queryselect.v1.SelectionService'][rpc.split('/').pop()];
const same = (bytes) => bytes;

/** The messages that come back; raises QuerySelectError. */
async function sent({ rpc, requests }) {
  const { responseDeserialize } = method(rpc);
  // On the wire a unary call is a stream of one message each way.
  const call = client.makeBidiStreamRequest(rpc, same, responseDeserialize, { deadline: Date.now() + 60_000 });
  requests.forEach((name) => call.write(read(name)));
  call.end();
  const answers = [];
  try {
    for await (const answer of call) answers.push(answer);
  } catch (error) {
    throw new QuerySelectError(error);
  }
  return answers;
}

/** What is promised of a call: the picks, or what an error says to programs. */
const chosen = (answers) => picks(answers.map((each) => each.result ?? each).find((each) => each.indices));
const told = ({ code, reason, field }) => ({ code, reason, field });

/** Numbers may differ in their last digits from machine to machine. */
const close = (one, other) => Math.abs(one - other) <= 1e-9 * Math.abs(other);

let different = 0;
for (const each of JSON.parse(read('manifest.json')).cases) {
  const { responseDeserialize } = method(each.rpc);
  let as;
  try {
    const found = chosen(await sent(each));
    const wanted = chosen(each.responses.map((name) => responseDeserialize(read(name))));
    as = found.length === wanted.length;
    as &&= found.every(({ row, score }, at) => row === wanted[at].row && close(score, wanted[at].score));
  } catch (error) {
    if (!(error instanceof QuerySelectError) || !each.status.length) throw error;
    const metadata = new grpc.Metadata();
    metadata.set('grpc-status-details-bin', read(each.status[0]));
    const wanted = new QuerySelectError({ code: grpc.status[each.code], details: '', metadata });
    as = JSON.stringify(told(error)) === JSON.stringify(told(wanted));
  }
  console.log(as ? 'as stored' : 'DIFFERENT', each.name, each.code);
  different += !as;
}
client.close();
process.exitCode = different ? 1 : 0;
