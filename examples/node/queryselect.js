// A client of QuerySelect: unary calls, streams, deadlines, cancellation, retries.
import { Readable, pipeline } from 'node:stream';
import { setTimeout } from 'node:timers/promises';
import zlib from 'node:zlib';
import grpc from '@grpc/grpc-js';
import { QuerySelectError } from './errors.js';
import { definition } from './protos.js';
import { byteLength } from './tensors.js';

export { QuerySelectError } from './errors.js';
export * from './tensors.js';

const { SelectionService, ServerService, StrategyService } = grpc.loadPackageDefinition(definition).queryselect.v1;

const MIB = 1 << 20;
/** Tensors, and lists, of at most so many bytes travel inside the start of a stream. */
const SMALL_BYTES = 64 << 10;
const LIST_BYTES = 4 * MIB;
/** What is there for each row of the pool, and may be scored as it comes. */
const ROWS = /^pool\.(embeddings|probabilities|logits|samples|gradients|scales|inputs)\b/;

const OPTIONS = {
  // A name with several addresses, as a headless Service of Kubernetes has, is several servers: each call goes to the next.
  'grpc.service_config': JSON.stringify({ loadBalancingConfig: [{ round_robin: {} }] }),
  'grpc.max_receive_message_length': 256 * MIB, // gRPC's own 4 MiB is less than the ids of a million picks
  'grpc.enable_retries': 0, // see retried
};

/**
 * A QuerySelect server. tls: true for the system's roots, or the PEM of your own as a Buffer. token: a bearer token.
 *
 * Every call takes timeout, in milliseconds, and signal, an AbortSignal; both stop the selection on the server too. All
 * fail with QuerySelectError; names that the proto does not have are a TypeError before anything is sent.
 */
export class Client {
  #selection;
  #server;
  #strategies;

  constructor(target, { tls = false, token } = {}) {
    const credentials = channelCredentials(tls, token);
    this.#selection = new SelectionService(target, credentials, OPTIONS);
    // Stubs with the same target, credentials and options share a connection.
    this.#server = new ServerService(target, credentials, OPTIONS);
    this.#strategies = new StrategyService(target, credentials, OPTIONS);
  }

  /** One message there, one back: a SelectRequest that fits 64 MiB, and its SelectResponse. */
  async select(request, options) {
    check(split(request).start);
    return unary((...call) => this.#selection.Select(request, ...call), options);
  }

  /** The same by a stream, for pools of any size. onProgress is told the server's messages of progress. */
  async stream(request, { timeout, signal, onProgress = () => {} } = {}) {
    begin(signal);
    const { start, large } = split(request);
    check(start);
    const call = this.#selection.SelectStream(new grpc.Metadata(), { deadline: deadline(timeout) });
    call.on('error', () => {}); // for await is told of it, but no longer once onProgress has failed
    const stop = () => call.cancel();
    signal?.addEventListener('abort', stop);
    const download = new Download();
    try {
      call.write({ start });
      for await (const message of call) {
        if (message.admitted) {
          const size = Number(message.admitted.recommended_chunk_bytes ?? MIB);
          // It waits where the server is slower than we are, and says at the end that this was all. What fails is told
          // by for await.
          pipeline(Readable.from(chunks(large, size)), call, () => {});
        } else if (message.progress) {
          onProgress(message.progress);
        } else if (message.result) {
          download.begin(message.result);
        } else if (message.chunk) {
          download.write(message.chunk);
        }
      }
    } catch (error) {
      throw error.code in grpc.status ? new QuerySelectError(error) : error;
    } finally {
      signal?.removeEventListener('abort', stop);
      call.cancel(); // where onProgress failed; after the end it does nothing
    }
    return download.whole();
  }

  /** What the server can run. */
  async strategies(options) {
    return (await unary((...call) => this.#strategies.ListStrategies({}, ...call), options)).strategies;
  }

  /** The server's version, devices and limits. */
  serverInfo(options) {
    return unary((...call) => this.#server.GetServerInfo({}, ...call), options);
  }

  close() {
    for (const stub of [this.#selection, this.#server, this.#strategies]) stub.close();
  }
}

/**
 * What attempt() gives, tried again where that may help: when the server says so, else after a doubling wait. Selections
 * change nothing on the server, so that the same one may always be sent again. A timeout is each attempt's; an
 * AbortSignal, made outside of attempt, is for all of them, and heeded after a wait.
 */
export async function retried(attempt, retries = 3) {
  for (let tried = 0; ; tried++) {
    try {
      return await attempt();
    } catch (error) {
      const again = error.retryable && tried < (error.code === 'DATA_LOSS' ? Math.min(1, retries) : retries);
      if (!again) throw error;
      const wait = error.retryAfter ?? Math.min(5, 0.1 * 2 ** tried);
      await setTimeout(wait * 1000 * (1 + Math.random() / 5)); // jitter keeps clients apart
    }
  }
}

function channelCredentials(tls, token) {
  if (!tls) {
    if (token) throw new Error('a token would travel in clear text; use tls');
    return grpc.credentials.createInsecure();
  }
  const secure = grpc.credentials.createSsl(tls === true ? null : tls);
  if (!token) return secure;
  const metadata = new grpc.Metadata();
  metadata.set('authorization', `Bearer ${token}`);
  const call = grpc.credentials.createFromMetadataGenerator((_, done) => done(null, metadata));
  return grpc.credentials.combineChannelCredentials(secure, call);
}

const deadline = (timeout) => (timeout === undefined ? undefined : Date.now() + timeout);

function begin(signal) {
  if (signal?.aborted) throw new QuerySelectError({ code: grpc.status.CANCELLED, details: 'cancelled before it began' });
}

async function unary(method, { timeout, signal } = {}) {
  begin(signal);
  return new Promise((resolve, reject) => {
    const stop = () => call.cancel();
    const call = method(new grpc.Metadata(), { deadline: deadline(timeout) }, (failure, response) => {
      signal?.removeEventListener('abort', stop);
      if (failure) reject(new QuerySelectError(failure));
      else resolve(response);
    });
    signal?.addEventListener('abort', stop);
  });
}

/** A request with its large tensors marked as streamed, and their bytes by path: pool.scales[0].gradients. */
function split(request) {
  const large = new Map();
  const walk = (value, path) => {
    if (value === null || typeof value !== 'object' || ArrayBuffer.isView(value)) return value;
    if (Array.isArray(value)) return value.map((each, at) => walk(each, `${path}[${at}]`));
    if (value.data?.byteLength > (value.shape?.length > 1 ? SMALL_BYTES : LIST_BYTES)) {
      large.set(path, value.data);
      const { data, ...rest } = value;
      return { ...rest, streamed: {} };
    }
    const parts = Object.entries(value).map(([name, each]) => [name, walk(each, path ? `${path}.${name}` : name)]);
    return Object.fromEntries(parts);
  };
  return { start: walk(request, ''), large };
}

/** Raises TypeError for names and values that the proto does not have: protobuf.js leaves them out without a word. */
function check(start) {
  const { serialize, deserialize } = definition['queryselect.v1.SelectRequest'];
  const [path] = lost(start, deserialize(serialize(start)));
  if (path) throw new TypeError(`${path.slice(1)} is not in the proto, or is of another type there`);
}

/** The paths of what was given and not kept. */
function* lost(given, kept, path = '') {
  if (given === null || given === undefined) return;
  if (ArrayBuffer.isView(given)) {
    if (given.byteLength !== kept?.length) yield path;
  } else if (typeof given === 'object') {
    for (const [name, each] of Object.entries(given)) {
      yield* lost(each, kept?.[name], path + (Array.isArray(given) ? `[${name}]` : `.${name}`));
    }
  } else if (kept === undefined || (typeof given === 'string' && typeof kept === 'string' && given !== kept)) {
    yield path;
  }
}

/**
 * The messages after the start: what the server needs before it can look at rows, then the tensors of rows side by
 * side, so that a row is whole soon after its first byte and a server that scores rows as they come holds few of them.
 */
function* chunks(large, size) {
  const tensors = [...large];
  const first = tensors.filter(([path]) => !ROWS.test(path)).map((each) => [each]);
  for (const group of [...first, tensors.filter(([path]) => ROWS.test(path))]) {
    const steps = Math.ceil(Math.max(...group.map(([, bytes]) => bytes.length)) / size);
    for (let step = 0; step < steps; step++) {
      for (const [path, bytes] of group) {
        const [offset, end] = [step, step + 1].map((at) => Math.floor((bytes.length * at) / steps));
        const data = bytes.subarray(offset, end);
        yield { chunk: { path, offset, data, crc32: zlib.crc32(data) } };
      }
    }
  }
}

/** A result whose large tensors come in chunks after it. */
class Download {
  #result;
  #missing = new Map(); // bytes still to come, by path

  begin(result) {
    this.#result = result;
    for (const path of ['indices', 'scores', 'pool_scores', 'pseudo_labels', 'ids.integers']) {
      const tensor = at(result, path);
      if (tensor?.streamed) {
        tensor.data = Buffer.alloc(byteLength(tensor));
        this.#missing.set(path, tensor.data.length);
      }
    }
  }

  write({ path, offset = 0, data }) {
    if (!this.#missing.has(path)) return; // of a tensor that this client does not know
    data.copy(at(this.#result, path).data, Number(offset));
    this.#missing.set(path, this.#missing.get(path) - data.length);
  }

  whole() {
    if (this.#result && ![...this.#missing.values()].some(Boolean)) return this.#result;
    throw new QuerySelectError({ code: grpc.status.DATA_LOSS, details: 'the stream ended before its answer' });
  }
}

const at = (message, path) => path.split('.').reduce((part, name) => part?.[name], message);
