package clickstream;

import static java.nio.charset.StandardCharsets.UTF_8;

import io.delta.storage.CloseableIterator;
import io.delta.storage.S3SingleDriverLogStore;
import java.io.FileNotFoundException;
import java.io.IOException;
import java.nio.file.FileAlreadyExistsException;
import java.util.Iterator;
import org.apache.hadoop.conf.Configuration;
import org.apache.hadoop.fs.FSDataOutputStream;
import org.apache.hadoop.fs.Options.CreateFileOptionKeys;
import org.apache.hadoop.fs.Path;

/**
 * Delta's log for a lake on S3 that several applications write.
 *
 * <p>Delta's own store for S3 keeps two writers apart within one driver only: of two drivers (a stream and a batch job)
 * that commit the same version, the second replaces the first one's commit, and its rows are gone without an error.
 * Here a commit is a write on the condition that the object does not exist yet, which S3 itself decides. No table
 * beside the bucket is needed, and other readers and writers of Delta that use the same condition (delta-rs) agree.
 *
 * <p>Set with spark.delta.logStore.s3a.impl=clickstream.S3Log.
 */
public final class S3Log extends S3SingleDriverLogStore {
  public S3Log(Configuration conf) {
    super(conf);
  }

  @Override
  public void write(Path path, Iterator<String> actions, Boolean overwrite, Configuration conf) throws IOException {
    StringBuilder lines = new StringBuilder();
    actions.forEachRemaining(action -> lines.append(action).append('\n'));
    String content = lines.toString();
    for (int attempt = 1; ; attempt++) {
      try {
        put(path, content, overwrite, conf);
        break;
      } catch (IOException error) {
        // The answer to a write may be lost and the write repeated: then the object that is in the way is our own,
        // which the transaction's identity in its first line tells from any other.
        if (!overwrite && exists(path, conf)) {
          if (content.equals(text(path, conf))) {
            break;
          }
          FileAlreadyExistsException lost = new FileAlreadyExistsException(path.toString());
          lost.initCause(error);
          throw lost;
        }
        // Two such writes at once may both be told to come again (409).
        if (overwrite || attempt == 3) {
          throw error;
        }
      }
    }
  }

  private static void put(Path path, String content, boolean overwrite, Configuration conf) throws IOException {
    FSDataOutputStream stream = create(path, overwrite, conf);
    try {
      stream.write(content.getBytes(UTF_8));
    } catch (IOException | RuntimeException error) {
      // To close it would make what was written so far the commit.
      stream.abort();
      throw error;
    }
    stream.close();
  }

  private static FSDataOutputStream create(Path path, boolean overwrite, Configuration conf) throws IOException {
    var builder = path.getFileSystem(conf).createFile(path).recursive().overwrite(overwrite);
    if (!overwrite) {
      // A file system that cannot do this refuses.
      builder.must(CreateFileOptionKeys.FS_OPTION_CREATE_CONDITIONAL_OVERWRITE, true);
    }
    return builder.build();
  }

  private static boolean exists(Path path, Configuration conf) throws IOException {
    try {
      return path.getFileSystem(conf).getFileStatus(path) != null;
    } catch (FileNotFoundException missing) {
      return false;
    }
  }

  private String text(Path path, Configuration conf) throws IOException {
    StringBuilder lines = new StringBuilder();
    try (CloseableIterator<String> found = read(path, conf)) {
      found.forEachRemaining(line -> lines.append(line).append('\n'));
    }
    return lines.toString();
  }
}
