package clickstream;

import io.delta.storage.HDFSLogStore;
import java.io.FileNotFoundException;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.net.URI;
import java.net.URISyntaxException;
import java.nio.file.Files;
import java.nio.file.NoSuchFileException;
import java.nio.file.StandardCopyOption;
import java.util.Arrays;
import java.util.Iterator;
import java.util.Optional;
import org.apache.hadoop.conf.Configuration;
import org.apache.hadoop.fs.DelegateToFileSystem;
import org.apache.hadoop.fs.FileAlreadyExistsException;
import org.apache.hadoop.fs.FileStatus;
import org.apache.hadoop.fs.FileSystem;
import org.apache.hadoop.fs.FsServerDefaults;
import org.apache.hadoop.fs.LocalFileSystem;
import org.apache.hadoop.fs.Path;
import org.apache.hadoop.fs.RawLocalFileSystem;
import org.apache.hadoop.fs.permission.FsPermission;
import org.apache.hadoop.util.DataChecksum;

/**
 * The file scheme for a lake on a local disk, in place of Hadoop's own.
 *
 * <p>Delta commits by renaming a file to a name that must not exist yet. Hadoop's local file system looks first
 * and renames then, so of two processes that commit the same version (a stream and the compaction beside it)
 * the second can replace the first one's commit, and its rows are gone without an error. Here that rename is a
 * hard link, which the kernel makes for one of them only.
 *
 * <p>Hadoop's also starts a {@code readlink} or {@code chmod} process for nearly every file; this one asks the
 * kernel itself. Set with fs.AbstractFileSystem.file.impl=clickstream.LakeFs and
 * fs.file.impl=clickstream.LakeFs$Local, and the log of its tables with
 * spark.delta.logStore.file.impl=clickstream.LakeFs$Log.
 */
public final class LakeFs extends DelegateToFileSystem {

  /**
   * The same for Hadoop's older interface; Spark expects a LocalFileSystem behind FileSystem.getLocal. Without the
   * checksum file that Hadoop's own adds to every file: it would double the lake's files, and a file written through
   * the one interface and read through the other would fail its check.
   */
  public static final class Local extends LocalFileSystem {
    public Local() {
      super(new Raw());
      setWriteChecksum(false);
      setVerifyChecksum(false);
    }
  }

  /**
   * Delta's log store, which lists a table's log several times in every batch. Delta's own asks for the size and
   * time of each file of the log, 100,000 after two days of a commit every three seconds, and then drops all but
   * the newest few; this one asks for those only.
   */
  public static final class Log extends HDFSLogStore {
    public Log(Configuration conf) {
      super(conf);
    }

    @Override
    public Iterator<FileStatus> listFrom(Path path, Configuration conf) throws IOException {
      java.nio.file.Path folder = local(path.getParent());
      String[] names = folder.toFile().list();
      if (names == null) {
        throw new FileNotFoundException("No such folder: " + folder);
      }
      FileSystem fs = path.getFileSystem(conf);
      return Arrays.stream(names)
          .filter(name -> name.compareTo(path.getName()) >= 0)
          .sorted()
          .flatMap(name -> status(fs, new Path(path.getParent(), name)).stream())
          .iterator();
    }

    /** Nothing when the clean-up of old log files has just taken it. */
    private static Optional<FileStatus> status(FileSystem fs, Path path) {
      try {
        return Optional.of(fs.getFileStatus(path));
      } catch (FileNotFoundException error) {
        return Optional.empty();
      } catch (IOException error) {
        throw new UncheckedIOException(error);
      }
    }
  }

  /** Permissions without a process for each. */
  private static final class Raw extends RawLocalFileSystem {
    @Override
    public void setPermission(Path path, FsPermission permission) throws IOException {
      java.nio.file.Path file = pathToFile(path).toPath();
      // A directory's setgid bit decides the group of what is made in it: keep it, as chmod(1) does.
      int kept = (Integer) Files.getAttribute(file, "unix:mode") & 06000;
      Files.setAttribute(file, "unix:mode", kept | permission.toShort() & 01777);
    }
  }

  public LakeFs(URI uri, Configuration conf) throws IOException, URISyntaxException {
    super(uri, new Raw(), conf, "file", false);
  }

  @Override
  public void renameInternal(Path source, Path target) throws IOException {
    java.nio.file.Path from = local(source);
    if (Files.isDirectory(from)) {
      super.renameInternal(source, target);
      return;
    }
    try {
      Files.createLink(local(target), from);
    } catch (java.nio.file.FileAlreadyExistsException error) {
      throw new FileAlreadyExistsException("rename destination " + target + " already exists");
    } catch (NoSuchFileException error) {
      throw new FileNotFoundException(error.getMessage());
    }
    Files.delete(from);
  }

  @Override
  public void renameInternal(Path source, Path target, boolean overwrite) throws IOException {
    java.nio.file.Path from = local(source);
    if (!overwrite) {
      renameInternal(source, target);
    } else if (Files.isDirectory(from)) {
      super.renameInternal(source, target, true);
    } else {
      Files.move(from, local(target), StandardCopyOption.ATOMIC_MOVE);
    }
  }

  /** A lake has no symbolic links of its own, and those on the way to it are the kernel's to follow. */
  @Override
  public FileStatus getFileLinkStatus(Path path) throws IOException {
    return getFileStatus(path);
  }

  @Override
  public boolean supportsSymlinks() {
    return false;
  }

  @Override
  public boolean isValidName(String name) {
    return true;
  }

  @Override
  public int getUriDefaultPort() {
    return -1;
  }

  @Override
  public FsServerDefaults getServerDefaults(Path path) {
    return getServerDefaults();
  }

  @Override
  @Deprecated
  public FsServerDefaults getServerDefaults() {
    return new FsServerDefaults(64 << 20, 512, 64 << 10, (short) 1, 4096, false, 0, DataChecksum.Type.CRC32);
  }

  private static java.nio.file.Path local(Path path) {
    return java.nio.file.Path.of(path.toUri().getPath());
  }
}
