# The machines of the inventory. Data disks are volumes of their own, which Ansible finds by their number and mounts.

locals {
  disks = merge([
    for node, settings in var.nodes : {
      for name, disk in settings.disks : "${node}-${name}" => {
        node     = node
        zone     = settings.zone
        size_gib = disk.size_gib
        mount    = disk.mount
        # What the cloud calls it; the kernel names the disks otherwise.
        device = "/dev/sd${disk.letter}"
      }
    }
  ]...)
}

resource "aws_instance" "this" {
  #checkov:skip=CKV2_AWS_41:only nodes that use the lake have a role; the others have no rights at all
  #checkov:skip=CKV_AWS_126:the platform measures itself, and every second
  for_each               = var.nodes
  ami                    = var.ami_id
  instance_type          = each.value.type
  subnet_id              = each.value.subnet_id
  vpc_security_group_ids = [each.value.security_group]
  iam_instance_profile   = each.value.instance_profile
  key_name               = var.key_name
  ebs_optimized          = true
  tags                   = { Name = "${var.name}-${each.key}" }

  metadata_options {
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
  }

  root_block_device {
    volume_type = "gp3"
    volume_size = each.value.root_gib
    encrypted   = true
    tags        = { Name = "${var.name}-${each.key}" }
  }

  lifecycle {
    # A newer image of Debian must not replace the machines; apt keeps them up to date.
    ignore_changes = [ami]
  }
}

resource "aws_ebs_volume" "this" {
  #checkov:skip=CKV_AWS_189:the account's default key encrypts it; a key of one's own is for what is shared
  for_each          = local.disks
  availability_zone = each.value.zone
  type              = "gp3"
  size              = each.value.size_gib
  encrypted         = true
  tags              = { Name = "${var.name}-${each.key}" }
}

resource "aws_volume_attachment" "this" {
  for_each    = local.disks
  device_name = each.value.device
  volume_id   = aws_ebs_volume.this[each.key].id
  instance_id = aws_instance.this[each.value.node].id
  # A file system in use is not torn away: the machine is stopped first. `cloud up` starts it again.
  stop_instance_before_detaching = true
}
